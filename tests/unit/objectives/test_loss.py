from dataclasses import replace

import pytest
import torch

from fuchsia_pl.batch import Batch, PolicyOutput, StepInfo
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.corrections import SamplerCorrection
from fuchsia_pl.objectives.loss import logprob_gap, policy_loss
from fuchsia_pl.objectives.presets import PRESETS
from fuchsia_pl.objectives.surrogates import SAPOSettings
from fuchsia_pl.rollouts.batcher import make_batches, split_balanced
from tests.doubles import denominators, make_sample


def make_batch(rows, num_tokens: int, num_rollouts: int) -> Batch:
    samples = [make_sample([1, 2], list(range(3, 3 + length)), advantage) for length, advantage in rows]
    return make_batches(split_balanced(samples, 1), StepInfo(0, denominators(num_tokens, num_rollouts), 0))[0]


def loss_and_gradient(config: LossConfig, batch: Batch, policy, reference=None, old=None, trainer_logprobs=None):
    """The output and its gradient by the policy's logprobs; the old ones are the policy's own unless given."""
    policy = policy.clone().requires_grad_()
    policy_output = PolicyOutput(policy, torch.zeros_like(policy), None)
    old = policy.detach() if old is None else old
    output = policy_loss(
        config, batch, policy_output, old, old if trainer_logprobs is None else trainer_logprobs, reference
    )
    output.loss.backward()
    return output, policy.grad


# Two rows of 3 and 1 sampled tokens with advantages 1.5 and -0.5; positions 1, 2, 3 and 1 carry them. The sampler had -1.0
# everywhere, and so has POLICY.
BATCH = make_batch([(3, 1.5), (1, -0.5)], num_tokens=4, num_rollouts=2)
POLICY = torch.full((2, 4), -1.0)
TOKEN_MEAN = LossConfig("ppo", clip_high=0.28)


def test_first_update_by_hand_is_reinforce():
    # Ratio 1, so each token's loss is -A and its gradient -A / 4 tokens:
    # loss (3 * -1.5 + 0.5) / 4 = -1; gradients -0.375 in row 0, +0.125 in row 1
    output, gradient = loss_and_gradient(TOKEN_MEAN, BATCH, POLICY)
    assert output.loss.item() == pytest.approx(-1.0)
    expected = torch.tensor([[0.0, -0.375, -0.375, -0.375], [0.0, 0.125, 0.0, 0.0]])
    torch.testing.assert_close(gradient, expected)
    assert output.metrics["train/clip_fraction"].item() == 0.0


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_every_surrogate_has_the_gradient_of_reinforce_at_the_first_update(surrogate, reduction):
    policy = torch.tensor([[0.0, -0.5, -0.4, -1.2], [0.0, -1.5, 0.0, 0.0]])
    _, expected = loss_and_gradient(LossConfig("grpo", surrogate="reinforce", reduction=reduction), BATCH, policy)
    assert expected.abs().max() > 0
    _, gradient = loss_and_gradient(LossConfig("grpo", surrogate=surrogate, reduction=reduction), BATCH, policy)
    torch.testing.assert_close(gradient, expected)


def test_dapo_with_equal_lengths_and_equal_bounds_is_grpo():
    batch = make_batch([(2, 1.5), (2, -0.5)], num_tokens=4, num_rollouts=2)
    policy = torch.tensor([[0.0, -0.5, -0.9], [0.0, -1.5, -1.1]])
    old = torch.full_like(policy, -1.0)
    grpo, grpo_gradient = loss_and_gradient(LossConfig("grpo"), batch, policy, old=old)
    dapo, dapo_gradient = loss_and_gradient(LossConfig("dapo", clip_high=0.2), batch, policy, old=old)
    assert grpo.loss.item() == pytest.approx(dapo.loss.item(), abs=1e-7)
    torch.testing.assert_close(grpo_gradient, dapo_gradient)
    # with different lengths they differ: sequence mean against token mean
    assert loss_and_gradient(LossConfig("grpo"), BATCH, POLICY)[0].loss.item() == pytest.approx(-0.5)
    assert loss_and_gradient(LossConfig("dapo", clip_high=0.2), BATCH, POLICY)[0].loss.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_gspo_of_length_one_is_grpo(level):
    batch = make_batch([(1, 1.5), (1, -0.5)], num_tokens=2, num_rollouts=2)
    policy, old = torch.tensor([[0.0, -0.9], [0.0, -1.5]]), torch.full((2, 2), -1.0)
    bounds = {"clip_low": 0.2, "clip_high": 0.2}
    gspo = loss_and_gradient(LossConfig("gspo", ratio_level=level, **bounds), batch, policy, old=old)
    grpo = loss_and_gradient(LossConfig("grpo"), batch, policy, old=old)
    assert gspo[0].loss.item() == pytest.approx(grpo[0].loss.item(), abs=1e-7)
    torch.testing.assert_close(gspo[1], grpo[1])
    assert (gspo[1] != 0).any()


def test_gspo_by_hand():
    # Row 0: log ratios 0.3, 0.1, -0.1, mean 0.1, s = e^0.1 = 1.10517092 within 0.2: loss -1.5 s = -1.65775638 at each token.
    # Row 1: log ratio 0.2, s = 1.22140276, A < 0: the unclipped term counts: 0.5 s = 0.61070138.
    # sequence_mean: (-1.65775638 + 0.61070138) / 2. Gradient: row 0 -1.5 s / 3 / 2 at each token, row 1 0.5 s / 2.
    policy = POLICY + torch.tensor([[0.0, 0.3, 0.1, -0.1], [0.0, 0.2, 0.0, 0.0]])
    config = LossConfig("gspo", clip_low=0.2, clip_high=0.2)
    output, gradient = loss_and_gradient(config, BATCH, policy, old=POLICY)
    assert output.loss.item() == pytest.approx(-0.5235275, abs=1e-6)
    expected = torch.tensor([[0.0, -0.27629273, -0.27629273, -0.27629273], [0.0, 0.30535069, 0.0, 0.0]])
    torch.testing.assert_close(gradient, expected)


def test_gmpo_by_hand():
    # Bounds -0.4 and 0.4. Row 0, A > 0: log ratios 0.3, 0.6, -0.9 become 0.3, 0.4, -0.9, mean -0.2 / 3, s = 0.93550699, loss
    # -1.5 s = -1.40326048 at each token. Row 1, A < 0: -0.6 becomes -0.4, s = 0.67032005, loss 0.5 s = 0.33516002.
    # sequence_mean: (-1.40326048 + 0.33516002) / 2. Gradient: -1.5 s / 3 / 2 at the two tokens of row 0 within bounds.
    policy = POLICY + torch.tensor([[0.0, 0.3, 0.6, -0.9], [0.0, -0.6, 0.0, 0.0]])
    output, gradient = loss_and_gradient(LossConfig("gmpo"), BATCH, policy, old=POLICY)
    assert output.loss.item() == pytest.approx(-0.53405023, abs=1e-6)
    expected = torch.tensor([[0.0, -0.23387675, 0.0, -0.23387675], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert output.metrics["train/clip_fraction"].item() == 0.5
    # The preset of GSPO has a ratio of the sequence, which GMPO does not use.
    bounds = {"clip_low": 0.32968, "clip_high": 0.491825}
    again, _ = loss_and_gradient(LossConfig("gspo", surrogate="gmpo", **bounds), BATCH, policy, old=POLICY)
    assert again.loss.item() == output.loss.item()


@pytest.mark.parametrize(
    ("reduction", "expected"), [("token_mean", -1.0), ("sequence_mean", -0.5), ("constant", -0.25)]
)
def test_prompt_and_padding_count_for_nothing(reduction, expected):
    # The rows of BATCH after a prompt of 6: 5 and 7 masked positions, whose losses of -1.5 and 0.5 would add -4 to the sum.
    samples = [make_sample([1] * 6, [3, 4, 5], 1.5), make_sample([1] * 6, [3], -0.5)]
    batch = make_batches(split_balanced(samples, 1), StepInfo(0, denominators(num_tokens=4, num_rollouts=2), 0))[0]
    batch = replace(batch, advantages=torch.where(batch.loss_mask, batch.advantages, 1.5))
    output, _ = loss_and_gradient(LossConfig(reduction=reduction), batch, torch.full((2, 8), -1.0))
    assert output.loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("loss_type", sorted(PRESETS))
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_unbiased"])
def test_masked_tokens_get_exactly_zero_gradient_even_where_they_are_not_numbers(loss_type, estimator):
    policy = torch.where(BATCH.loss_mask, POLICY, float("nan"))
    hidden = replace(
        BATCH,
        sampling_logprobs=torch.where(BATCH.loss_mask, BATCH.sampling_logprobs, float("nan")),
        advantages=torch.where(BATCH.loss_mask, BATCH.advantages, float("nan")),
    )
    config = LossConfig(loss_type, beta=0.1, kl_estimator=estimator, kl_in="loss")
    output, gradient = loss_and_gradient(config, hidden, policy, policy - 0.1)
    assert output.loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[~BATCH.loss_mask] == 0.0).all()
    assert (gradient[BATCH.loss_mask] != 0.0).any()
    assert all(value.isfinite() for value in output.metrics.values())


@pytest.mark.parametrize("loss_type", sorted(PRESETS))
def test_a_batch_without_kept_tokens_is_zero_with_a_graph(loss_type):
    step = replace(BATCH.step, denominators=denominators(0, 0))
    nothing = replace(BATCH, loss_mask=torch.zeros_like(BATCH.loss_mask), step=step)
    output, gradient = loss_and_gradient(LossConfig(loss_type), nothing, POLICY)
    assert output.loss.item() == 0.0
    assert (gradient == 0).all()


def test_ratio_to_the_sampler_by_hand():
    # The sampler had -1.0 everywhere. Row 0: logp -0.5, ratio e^0.5 = 1.6487 above 1.28: loss -1.28 * 1.5 = -1.92, no gradient.
    # Row 1: logp -1.5, ratio e^-0.5 = 0.6065 below 0.8 with A < 0: loss 0.8 * 0.5 = 0.4, no gradient.
    policy = torch.tensor([[0.0, -0.5, -0.5, -0.5], [0.0, -1.5, 0.0, 0.0]])
    output, gradient = loss_and_gradient(replace(TOKEN_MEAN, old_logprobs="sampler"), BATCH, policy)
    assert output.loss.item() == pytest.approx((3 * -1.92 + 0.4) / 4)
    assert (gradient == 0).all()
    assert output.metrics["train/clip_fraction"].item() == 1.0
    assert output.metrics["train/sampler_weight"].item() == 1.0  # the ratio holds the mismatch: it is corrected once


def test_a_second_update_by_hand():
    # The trainer had -1.2 before the first update, the sampler -1.0; now the policy has -1.1.
    # ratio e^0.1 = 1.10517092; weight e^-0.2 = 0.81873075; token losses -1.5 r w and 0.5 r w, r w = 0.90483742
    old = torch.full((2, 4), -1.2)
    output, _ = loss_and_gradient(TOKEN_MEAN, BATCH, torch.full((2, 4), -1.1), old=old)
    assert output.loss.item() == pytest.approx((3 * -1.5 + 0.5) * 0.90483742 / 4, abs=1e-6)
    assert output.metrics["train/sampler_weight"].item() == pytest.approx(0.81873075)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        # trainer - sampler: row 0 ln 4, 0, -ln 2 (sum ln 2, mean 0.23104906), row 1 -ln 4
        ({"mode": "disabled"}, [[1.0, 1.0, 1.0], [1.0]]),
        ({"level": "token"}, [[2.0, 1.0, 0.5], [0.25]]),
        ({"level": "token", "low": 0.4}, [[2.0, 1.0, 0.5], [0.4]]),
        ({"level": "token", "mode": "mask"}, [[0.0, 1.0, 0.5], [0.25]]),
        ({"level": "token", "mode": "mask", "low": 0.3}, [[0.0, 1.0, 0.5], [0.0]]),
        ({"level": "sequence", "high": 1.5}, [[1.5, 1.5, 1.5], [0.25]]),
        ({"level": "sequence", "high": 1.5, "mode": "mask"}, [[0.0, 0.0, 0.0], [0.25]]),
        ({"level": "geometric"}, [[1.25992105, 1.25992105, 1.25992105], [0.25]]),
    ],
)
def test_the_sampler_correction_by_hand(settings, weights):
    log2 = torch.tensor(2.0).log().item()
    difference = torch.tensor([[0.0, 2 * log2, 0.0, -log2], [0.0, -2 * log2, 0.0, 0.0]])
    config = replace(TOKEN_MEAN, sampler_correction=SamplerCorrection(**settings))
    output, gradient = loss_and_gradient(config, BATCH, POLICY, trainer_logprobs=POLICY + difference)
    expected = torch.zeros(2, 4)
    expected[0, 1:], expected[1, 1] = -1.5 / 4 * torch.tensor(weights[0]), 0.5 / 4 * weights[1][0]
    torch.testing.assert_close(gradient, expected)
    flat = [*weights[0], *weights[1]]
    assert output.metrics["train/sampler_weight"].item() == pytest.approx(sum(flat) / 4, abs=1e-6)


def test_the_metrics_of_the_correction_by_hand():
    # ratios 4, 1, 1/2 and 1/4: mean 5.75 / 4, largest 4; bounds 0.3 and 2: two outside; weights 2, 1, 0.5, 0.3
    log2 = torch.tensor(2.0).log().item()
    difference = torch.tensor([[0.0, 2 * log2, 0.0, -log2], [0.0, -2 * log2, 0.0, 0.0]])
    config = replace(TOKEN_MEAN, sampler_correction=SamplerCorrection(low=0.3))
    metrics = loss_and_gradient(config, BATCH, POLICY, trainer_logprobs=POLICY + difference)[0].metrics
    assert metrics["train/sampler_ratio"].item() == pytest.approx(1.4375)
    assert metrics["train/sampler_ratio_max"].item() == pytest.approx(4.0)
    assert metrics["train/sampler_weight"].item() == pytest.approx(0.95)
    assert metrics["train/sampler_bounded_fraction"].item() == 0.5


def test_the_largest_ratio_is_that_of_a_sampled_token():
    # every ratio is e^-1, and what the mask hides would be 1
    metrics = loss_and_gradient(TOKEN_MEAN, BATCH, POLICY, trainer_logprobs=POLICY - 1.0)[0].metrics
    assert metrics["train/sampler_ratio_max"].item() == pytest.approx(0.36787944)


@pytest.mark.parametrize("loss_type", ["reinforce", "sapo"])
def test_what_has_no_bound_clips_nothing(loss_type):
    metrics = loss_and_gradient(LossConfig(loss_type), BATCH, POLICY, old=POLICY - 3.0)[0].metrics
    assert metrics["train/clip_fraction"].item() == 0.0


def test_gradient_flows_through_the_policys_scores_only():
    batch = replace(BATCH, old_values=torch.zeros(2, 4), value_targets=torch.ones(2, 4))
    policy_output = PolicyOutput(*(POLICY.clone().requires_grad_() for _ in range(3)))
    old, trainer_logprobs = POLICY.clone().requires_grad_(), POLICY.clone().requires_grad_()
    config = LossConfig("ppo", advantage="gae", beta=0.1, kl_estimator="k3_unbiased", entropy_weight=0.1)
    output = policy_loss(config, batch, policy_output, old, trainer_logprobs, POLICY - 0.1)
    output.loss.backward()
    assert old.grad is None
    assert trainer_logprobs.grad is None
    assert all(
        tensor.grad is not None for tensor in (policy_output.logprobs, policy_output.entropies, policy_output.values)
    )
    assert not [name for name, value in output.metrics.items() if value.requires_grad]


def test_an_unknown_sampling_logprob_shows_in_the_loss_and_in_the_gap():
    unknown = BATCH.sampling_logprobs.clone()
    unknown[0, 2] = float("nan")
    batch = replace(BATCH, sampling_logprobs=unknown)
    assert loss_and_gradient(TOKEN_MEAN, batch, POLICY)[0].loss.isnan()
    assert logprob_gap(batch, POLICY).isnan()  # at which the sync stops the run before the update


def test_the_gap_by_hand():
    # |-0.5 + 1| on three tokens and |-2 + 1| on one, over 4 tokens; what the mask hides counts for nothing
    trainer_logprobs = torch.tensor([[9.0, -0.5, -0.5, -0.5], [9.0, -2.0, 9.0, 9.0]], requires_grad=True)
    gap = logprob_gap(BATCH, trainer_logprobs)
    assert gap.item() == pytest.approx(0.625)
    assert not gap.requires_grad


def test_kl_by_hand():
    # ref 0.1 above: d = 0.1, k3 = e^0.1 - 1 - 0.1 = 0.00517092 on each token; k1 = -0.1; k2 = 0.005
    reference = POLICY + 0.1
    for estimator, value in {"k1": -0.1, "k2": 0.005, "k3": 0.00517092}.items():
        config = replace(TOKEN_MEAN, beta=2.0, kl_estimator=estimator)
        output, _ = loss_and_gradient(config, BATCH, POLICY, reference)
        assert output.metrics["train/kl"].item() == pytest.approx(value, abs=1e-7)
        assert output.loss.item() == pytest.approx(-1.0 + 2.0 * value, abs=1e-6)


def test_a_kl_in_the_reward_is_not_in_the_loss():
    config = replace(TOKEN_MEAN, beta=2.0, kl_in="reward")
    output, gradient = loss_and_gradient(config, BATCH, POLICY)
    without, expected = loss_and_gradient(TOKEN_MEAN, BATCH, POLICY)
    assert output.loss.item() == without.loss.item()
    assert torch.equal(gradient, expected)
    assert "train/kl" not in output.metrics


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_unbiased"])
def test_the_kl_pulls_towards_the_reference(estimator):
    batch = replace(BATCH, advantages=torch.zeros(2, 4))
    _, gradient = loss_and_gradient(LossConfig(beta=1.0, kl_estimator=estimator), batch, POLICY, POLICY + 0.5)
    assert (gradient[batch.loss_mask] < 0).all()  # descending raises logprobs that lie below the reference's


def test_the_entropy_bonus_by_hand():
    # entropies 0.4, 0.8, 0.6 and 1.4 over 4 tokens: mean 0.8, weight 0.5: -1 - 0.4; its gradient by each is -0.5 / 4
    entropies = torch.tensor([[9.0, 0.4, 0.8, 0.6], [9.0, 1.4, 9.0, 9.0]], requires_grad=True)
    policy_output = PolicyOutput(POLICY, entropies, None)
    output = policy_loss(replace(TOKEN_MEAN, entropy_weight=0.5), BATCH, policy_output, POLICY, POLICY, None)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(-1.4)
    assert output.metrics["train/entropy"].item() == pytest.approx(0.8)
    torch.testing.assert_close(entropies.grad, torch.where(BATCH.loss_mask, -0.125, 0.0))


def test_the_critics_loss_by_hand():
    # old values 0, targets 1, clip 0.2. values 0.1 three times and 0.5: 0.405 each and (0.2 - 1)^2 / 2 = 0.32.
    # (3 * 0.405 + 0.32) / 4 = 0.38375, weight 2; gradients 2 * -0.9 / 4 and 0.
    values = torch.tensor([[9.0, 0.1, 0.1, 0.1], [9.0, 0.5, 9.0, 9.0]], requires_grad=True)
    batch = replace(BATCH, old_values=torch.zeros(2, 4), value_targets=torch.ones(2, 4))
    config = LossConfig("ppo", advantage="gae")
    config.critic.value_weight = 2.0
    output = policy_loss(config, batch, PolicyOutput(POLICY, POLICY, values), POLICY, POLICY, None)
    output.loss.backward()
    assert output.metrics["train/value_loss"].item() == pytest.approx(0.38375)
    assert output.loss.item() == pytest.approx(-1.0 + 0.7675)
    expected = torch.tensor([[0.0, -0.45, -0.45, -0.45], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(values.grad, expected)


def test_reductions_by_hand():
    # token losses -1.5 three times and 0.5 once: sequence mean (-1.5 + 0.5) / 2, constant (-4.5 + 0.5) / (2 * 8), and / 2
    for settings, expected in (
        ({"reduction": "sequence_mean"}, -0.5),
        ({"reduction": "constant"}, -0.25),
        ({"reduction": "constant", "constant_length": 1}, -2.0),
    ):
        output, _ = loss_and_gradient(LossConfig("ppo", **settings), BATCH, POLICY)
        assert output.loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "change",
    [
        {"loss_type": "grpo"},
        {"surrogate": "cispo"},
        {"clip_low": 0.5},
        {"clip_high": 0.9},
        {"dual_clip": 1.1},
        {"ratio_level": "sequence"},
        {"old_logprobs": "sampler"},
        {"beta": 0.5},
        {"kl_estimator": "k1"},
        {"kl_in": "reward"},
        {"reduction": "sequence_mean"},
        {"constant_length": 3, "reduction": "constant"},
        {"entropy_weight": 0.3},
        {"sampler_correction": SamplerCorrection(mode="mask", high=1.1)},
        {"sampler_correction": SamplerCorrection(level="sequence")},
        {"sampler_correction": SamplerCorrection(low=0.99)},
    ],
    ids=lambda change: ", ".join(change),
)
def test_every_setting_changes_the_loss(change):
    # ratios on both sides of both bounds, for both signs of the advantage
    batch = make_batch([(3, 1.5), (3, -0.5), (1, 0.5)], num_tokens=7, num_rollouts=3)
    policy = torch.tensor([[0.0, -0.5, -0.4, -1.2], [0.0, -0.7, -1.3, -0.2], [0.0, -0.3, 0.0, 0.0]])
    trainer_logprobs = torch.tensor([[0.0, -1.2, -0.7, -1.0], [0.0, -0.8, -0.9, -0.9], [0.0, -0.6, 0.0, 0.0]])

    def loss(config: LossConfig) -> float:
        policy_output = PolicyOutput(policy, policy.abs(), None)
        return policy_loss(
            config, batch, policy_output, trainer_logprobs, trainer_logprobs, torch.full((3, 4), -1.0)
        ).loss.item()

    config = LossConfig("ppo", beta=0.1)
    assert loss(config) != pytest.approx(loss(replace(config, **change)), abs=1e-6)


def test_the_temperatures_of_sapo_change_the_loss():
    policy, old = torch.tensor([[0.0, -0.5, -0.4, -1.2], [0.0, -0.7, 0.0, 0.0]]), POLICY
    before = loss_and_gradient(LossConfig("sapo"), BATCH, policy, old=old)[0].loss.item()
    for change in ({"temperature_positive": 2.0}, {"temperature_negative": 2.0}):
        after = loss_and_gradient(LossConfig("sapo", sapo=SAPOSettings(**change)), BATCH, policy, old=old)[
            0
        ].loss.item()
        assert before != pytest.approx(after, abs=1e-6)
