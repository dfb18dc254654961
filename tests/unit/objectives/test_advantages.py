import pytest
import torch

from fuchsia_pl.objectives.advantages import group_advantages, has_spread


def test_a_pair_by_hand():
    # mean 0.5, unbiased variance (0.25 + 0.25) / (2 - 1) = 0.5, std 0.70710678: 0.5 / (0.70710678 + 0.0001) = 0.70700679
    advantages = group_advantages(torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[-0.70700679, 0.70700679]], dtype=torch.float64))


def test_one_right_of_four_by_hand():
    # mean 0.25, deviations 0.75 and 3 times -0.25, variance (0.5625 + 0.1875) / 3 = 0.25, std 0.5
    # 0.75 / 0.5001 = 1.49970006, -0.25 / 0.5001 = -0.49990002
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    expected = torch.tensor([[1.49970006, -0.49990002, -0.49990002, -0.49990002]], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected)


def test_the_better_sibling_is_pushed_up():
    advantages = group_advantages(torch.tensor([[0.1, 0.9]]))
    assert advantages[0, 1] > 0 > advantages[0, 0]


def test_each_group_sums_to_zero_and_is_on_its_own():
    rewards = torch.rand(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = group_advantages(rewards)
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(advantages[2:3], group_advantages(rewards[2:3]))


def test_a_constant_added_to_all_rewards_changes_nothing():
    rewards = torch.tensor([[0.0, 1.0, 0.5]])
    torch.testing.assert_close(group_advantages(rewards + 7.0), group_advantages(rewards))


def test_rounding_noise_is_no_spread():
    # 0.1 + 0.2 = 0.30000000000000004: dividing that difference by its own std would give advantages near 1
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)
    assert not has_spread(rewards).item()
    assert group_advantages(rewards).tolist() == [[0.0, 0.0, 0.0]]


def test_the_tolerance_has_two_sides_and_grows_with_the_rewards():
    # of magnitude at most 1 the bound is 1e-6, of magnitude 1000 it is 1e-3
    rewards = torch.tensor(
        [[0.0, 0.9e-6], [0.0, 1.1e-6], [1000.0, 1000.0009], [1000.0, 1000.0011]], dtype=torch.float64
    )
    assert has_spread(rewards).tolist() == [False, True, False, True]


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 siblings.*got 1.*group_size"):
        group_advantages(torch.tensor([[1.0]]))
