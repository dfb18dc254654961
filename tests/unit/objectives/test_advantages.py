import pytest
import torch

from fuchsia_pl.objectives.advantages import (
    batch_norm_advantages,
    group_mean_advantages,
    group_norm_advantages,
    has_spread,
    leave_one_out_advantages,
    moments,
)

NAN = float("nan")
OF_GROUPS = [group_mean_advantages, group_norm_advantages, leave_one_out_advantages]


def test_a_pair_by_hand():
    # mean 0.5, unbiased variance (0.25 + 0.25) / (2 - 1) = 0.5, std 0.70710678: 0.5 / (0.70710678 + 0.0001) = 0.70700679
    advantages = group_norm_advantages(torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[-0.70700679, 0.70700679]], dtype=torch.float64))


def test_one_right_of_four_by_hand():
    # mean 0.25, deviations 0.75 and 3 times -0.25, variance (0.5625 + 0.1875) / 3 = 0.25, std 0.5
    # 0.75 / 0.5001 = 1.49970006, -0.25 / 0.5001 = -0.49990002
    advantages = group_norm_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    expected = torch.tensor([[1.49970006, -0.49990002, -0.49990002, -0.49990002]], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected)


def test_the_better_sibling_is_pushed_up():
    advantages = group_norm_advantages(torch.tensor([[0.1, 0.9]]))
    assert advantages[0, 1] > 0 > advantages[0, 0]


def test_each_group_sums_to_zero_and_is_on_its_own():
    rewards = torch.rand(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = group_norm_advantages(rewards)
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(advantages[2:3], group_norm_advantages(rewards[2:3]))


def test_a_constant_added_to_all_rewards_changes_nothing():
    rewards = torch.tensor([[0.0, 1.0, 0.5]])
    torch.testing.assert_close(group_norm_advantages(rewards + 7.0), group_norm_advantages(rewards))


def test_rounding_noise_is_no_spread():
    # 0.1 + 0.2 = 0.30000000000000004: dividing that difference by its own std would give advantages near 1
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)
    assert not has_spread(rewards).item()
    assert group_norm_advantages(rewards).tolist() == [[0.0, 0.0, 0.0]]


def test_the_tolerance_has_two_sides_and_grows_with_the_rewards():
    # of magnitude at most 1 the bound is 1e-6, of magnitude 1000 it is 1e-3
    rewards = torch.tensor(
        [[0.0, 0.9e-6], [0.0, 1.1e-6], [1000.0, 1000.0009], [1000.0, 1000.0011]], dtype=torch.float64
    )
    assert has_spread(rewards).tolist() == [False, True, False, True]


@pytest.mark.parametrize("function", OF_GROUPS)
def test_a_group_of_one_is_refused(function):
    with pytest.raises(ValueError, match=r"at least 2 siblings.*got 1.*group_size"):
        function(torch.tensor([[1.0]]))


def test_group_mean_by_hand():
    # mean (1 + 0 + 0 + 3) / 4 = 1
    advantages = group_mean_advantages(torch.tensor([[1.0, 0.0, 0.0, 3.0]]))
    assert advantages.tolist() == [[0.0, -1.0, -1.0, 2.0]]


def test_leave_one_out_by_hand():
    # the others' means are (0 + 0 + 3) / 3 = 1, (1 + 0 + 3) / 3 = 4/3 twice, and (1 + 0 + 0) / 3 = 1/3
    advantages = leave_one_out_advantages(torch.tensor([[1.0, 0.0, 0.0, 3.0]], dtype=torch.float64))
    expected = torch.tensor([[0.0, -4 / 3, -4 / 3, 8 / 3]], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected)


def test_leave_one_out_of_a_pair_is_the_difference_of_its_rewards():
    # A_1 = r_1 - r_2 and A_2 = r_2 - r_1: a baseline that held the own reward would halve it
    assert leave_one_out_advantages(torch.tensor([[0.75, 0.25]])).tolist() == [[0.5, -0.5]]


def test_an_unscored_sibling_takes_no_part_by_hand():
    # scored 0 and 1: as in the pair, means 0.5, std 0.70710678, and the other's reward as baseline
    rewards = torch.tensor([[0.0, NAN, 1.0]], dtype=torch.float64)
    assert group_mean_advantages(rewards).tolist() == [[-0.5, 0.0, 0.5]]
    assert leave_one_out_advantages(rewards).tolist() == [[-1.0, 0.0, 1.0]]
    expected = torch.tensor([[-0.70700679, 0.0, 0.70700679]], dtype=torch.float64)
    torch.testing.assert_close(group_norm_advantages(rewards), expected)


@pytest.mark.parametrize("function", OF_GROUPS)
@pytest.mark.parametrize("rewards", [[NAN, NAN, NAN], [NAN, 2.0, NAN], [2.0, 2.0, NAN]])
def test_nothing_to_compare_is_no_advantage(function, rewards):
    assert function(torch.tensor([rewards])).tolist() == [[0.0, 0.0, 0.0]]
    assert not has_spread(torch.tensor([rewards])).item()


def test_unscored_siblings_hide_no_spread():
    assert has_spread(torch.tensor([[NAN, 1.0, 2.0]])).item()


@pytest.mark.parametrize("function", OF_GROUPS)
def test_rounding_noise_is_no_advantage_by_any_baseline(function):
    assert function(torch.tensor([[0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)).abs().max().item() == 0.0


def test_batch_normalisation_by_hand():
    # mean 2, squares 4 + 0 + 4 = 8, variance 8 / (3 - 1) = 4, std 2: -2 / 2.0001 = -0.99995
    values = torch.tensor([0.0, 2.0, 4.0])
    expected = torch.tensor([-0.999950002, 0.0, 0.999950002], dtype=torch.float64)
    torch.testing.assert_close(batch_norm_advantages(values, moments(values)), expected)


def test_moments_of_ranks_add_up():
    # the three values of the test above on two ranks
    ranks = torch.tensor([0.0]), torch.tensor([2.0, 4.0])
    whole = moments(ranks[0]) + moments(ranks[1])
    assert whole.tolist() == [3.0, 6.0, 20.0]
    assert batch_norm_advantages(ranks[1], whole).tolist() == pytest.approx([0.0, 0.999950002])


@pytest.mark.parametrize("values", [[], [3.0], [0.3, 0.1 + 0.2, 0.3]])
def test_a_step_without_spread_has_no_normalised_advantage(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    assert batch_norm_advantages(tensor, moments(tensor)).tolist() == [0.0] * len(values)


def test_the_tolerance_of_a_step_has_two_sides():
    # std of (0, x) is x / sqrt(2): 0.71e-6 for 1e-6 and 1.41e-6 for 2e-6, with a tolerance of 1e-6
    for spread, differs in ((1e-6, False), (2e-6, True)):
        values = torch.tensor([0.0, spread], dtype=torch.float64)
        assert bool(batch_norm_advantages(values, moments(values)).any()) is differs


def test_the_tolerance_grows_with_rewards_of_either_sign_and_beside_unscored_siblings():
    # a range of 0.0009 within 1e-6 of the magnitude 1000
    for rewards in ([-1000.0, -1000.0009, -1000.0], [1000.0, 1000.0009, NAN]):
        assert not has_spread(torch.tensor([rewards], dtype=torch.float64)).item()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_tolerance_of_a_step_grows_with_its_values(sign):
    # std of 1000 -+ 0.0004 is 0.00057, within 1e-6 of the magnitude 1000; that of 1000 -+ 0.001 is 0.0014, outside
    for deviation, differs in ((0.0004, False), (0.001, True)):
        values = sign * torch.tensor([1000.0 - deviation, 1000.0 + deviation], dtype=torch.float64)
        assert bool(batch_norm_advantages(values, moments(values)).any()) is differs
