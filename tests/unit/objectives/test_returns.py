import pytest
import torch

from fuchsia_pl.objectives.returns import gae, rewards_to_go, value_loss

# One row: sampled, environment, sampled, sampled, padding.
MASK = torch.tensor([[True, False, True, True, False]])
REWARDS = torch.tensor([[0.5, 0.0, 0.0, 1.0, 0.0]])
VALUES = torch.tensor([[0.2, 9.0, 0.4, 0.6, 9.0]])


def test_rewards_to_go_by_hand():
    # 0.5 + 0 + 1, then 0 + 1, then 1
    assert rewards_to_go(REWARDS, MASK).tolist() == [[1.5, 0.0, 1.0, 1.0, 0.0]]


def test_what_stands_at_other_positions_is_no_reward():
    rewards = torch.where(MASK, REWARDS, float("nan"))
    assert rewards_to_go(rewards, MASK).tolist() == [[1.5, 0.0, 1.0, 1.0, 0.0]]


def test_gae_by_hand():
    # gamma 0.9, lambda 0.5, so the factor is 0.45, and the next step of the first token is the third position:
    # d_3 = 1 - 0.6 = 0.4                      A_3 = 0.4
    # d_2 = 0 + 0.9 * 0.6 - 0.4 = 0.14         A_2 = 0.14 + 0.45 * 0.4 = 0.32
    # d_0 = 0.5 + 0.9 * 0.4 - 0.2 = 0.66       A_0 = 0.66 + 0.45 * 0.32 = 0.804
    advantages = gae(REWARDS, VALUES, MASK, gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.804, 0.0, 0.32, 0.4, 0.0]]))


def test_lambda_one_is_the_return_less_the_value_and_lambda_zero_the_one_step_error():
    # returns 1.5, 1, 1 less 0.2, 0.4, 0.6; errors 0.5 + 0.4 - 0.2, 0.6 - 0.4, 1 - 0.6
    torch.testing.assert_close(gae(REWARDS, VALUES, MASK, 1.0, 1.0), torch.tensor([[1.3, 0.0, 0.6, 0.4, 0.0]]))
    torch.testing.assert_close(gae(REWARDS, VALUES, MASK, 1.0, 0.0), torch.tensor([[0.7, 0.0, 0.2, 0.4, 0.0]]))


def test_values_at_environment_tokens_change_nothing():
    other = torch.where(MASK, VALUES, torch.tensor(-70.0))
    assert torch.equal(gae(REWARDS, other, MASK, 0.9, 0.5), gae(REWARDS, VALUES, MASK, 0.9, 0.5))
    assert not torch.equal(gae(REWARDS, 2 * VALUES, MASK, 0.9, 0.5), gae(REWARDS, VALUES, MASK, 0.9, 0.5))


def test_rows_do_not_mix():
    rewards, values, mask = REWARDS.repeat(2, 1), VALUES.repeat(2, 1), MASK.repeat(2, 1)
    rewards[1] = 7.0
    assert torch.equal(gae(rewards, values, mask, 0.9, 0.5)[0], gae(REWARDS, VALUES, MASK, 0.9, 0.5)[0])


@pytest.mark.parametrize("mask", [[False, False], [True, False]])
def test_no_kept_token_and_one(mask):
    # one token: A = r - V
    advantages = gae(torch.tensor([[1.0, 5.0]]), torch.tensor([[0.25, 3.0]]), torch.tensor([mask]), 0.9, 0.5)
    assert advantages.tolist() == ([[0.75, 0.0]] if mask[0] else [[0.0, 0.0]])


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        # old value 0, clip 0.2. Towards the target 1 within the clip: (0.1 - 1)^2 / 2, gradient V - R
        (0.1, 1.0, 0.405, -0.9),
        # just inside and beyond it: (0.19 - 1)^2 / 2; then (0.2 - 1)^2 / 2, without a gradient
        (0.19, 1.0, 0.32805, -0.81),
        (0.5, 1.0, 0.32, 0.0),
        # beyond the clip on the wrong side: the unclipped term is the larger and pulls back
        (-0.5, 1.0, 1.125, -1.5),
        # the other direction
        (-0.5, -1.0, 0.32, 0.0),
        (0.5, -1.0, 1.125, 1.5),
    ],
)
def test_value_loss_by_hand(value, target, loss, gradient):
    values = torch.tensor([value], requires_grad=True)
    got = value_loss(values, torch.tensor([0.0]), torch.tensor([target]), clip=0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_the_clip_is_around_the_old_value():
    # V 0.6 within 0.2 of V_old 0.5: the clipped value is V itself, (0.6 - 0)^2 / 2; around 0 it would be 0.2
    assert value_loss(torch.tensor(0.6), torch.tensor(0.5), torch.tensor(0.0), clip=0.2).item() == pytest.approx(0.18)
    # V 0.9 is clipped to 0.7: with the target 1.5 the clipped term is the larger, (0.7 - 1.5)^2 / 2
    assert value_loss(torch.tensor(0.9), torch.tensor(0.5), torch.tensor(1.5), clip=0.2).item() == pytest.approx(0.32)
