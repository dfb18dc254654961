"""Intervals by hand, and their coverage in 2,000 simulated evaluations."""

import math

import pytest
import torch

from fuchsia_pl.evaluation.intervals import mean_interval, mean_intervals, share_difference_interval, share_interval

NUM_RUNS = 2000
SIZES = (16, 32, 64, 200)


def beta(a: float, b: float, *shape: int) -> torch.Tensor:
    return torch.distributions.Beta(torch.tensor(a), torch.tensor(b)).sample(shape)


def successes(chances: torch.Tensor, num_samples: int) -> torch.Tensor:
    return torch.distributions.Binomial(num_samples, chances.clamp(max=1.0)).sample()


def covered(lows, highs, mean: float) -> float:
    lows, highs = torch.as_tensor(lows), torch.as_tensor(highs)
    return float(((lows <= mean + 1e-9) & (mean - 1e-9 <= highs)).double().mean())


# Known intervals of Wilson: 42 and 0 of 64, 1 of 10, 10 of 10.
@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    [(42, 64, 0.5340, 0.7608), (0, 64, 0.0, 0.0566), (1, 10, 0.0179, 0.4042), (10, 10, 0.7225, 1.0)],
)
def test_the_interval_of_one_sample_per_item_is_wilsons(right, number, low, high):
    values = torch.tensor([1.0] * right + [0.0] * (number - right))
    assert share_interval(values) == pytest.approx((low, high), abs=1e-4)


def test_samples_of_one_item_are_fewer_observations_than_samples_of_several():
    """Two samples each: both alike are as many observations as items; independent ones are more, and never more than all."""
    alike = share_interval(torch.tensor([1.0] * 16 + [0.0] * 16))
    between = share_interval(torch.tensor([1.0] * 8 + [0.5] * 16 + [0.0] * 8))
    all_apart = share_interval(torch.tensor([1.0] * 32 + [0.0] * 32))
    assert alike == share_interval(torch.tensor([1.0] * 16 + [0.0] * 16))
    assert alike[0] < between[0] < all_apart[0]
    assert alike[1] > between[1] > all_apart[1]


def test_the_difference_of_one_sample_per_item_is_agresti_and_mins():
    """36 and 4 of 64 items differ: 32 / 66, and the variance of 36.5 + and 4.5 - of 66."""
    mean = 32 / 66
    half = 1.959964 * math.sqrt((41 / 66 - mean**2) / 66)
    values = torch.tensor([1.0] * 36 + [-1.0] * 4 + [0.0] * 24)
    assert share_difference_interval(values, 1) == pytest.approx((mean - half, mean + half), abs=1e-6)


def test_equal_policies_have_an_interval_around_zero():
    """0 +- 1.96 sqrt(1 / 66 / 66): that no item differs does not show that none would."""
    assert share_difference_interval(torch.zeros(64), 1) == pytest.approx((-1.96 / 66, 1.96 / 66), abs=1e-4)
    low, high = share_difference_interval(torch.zeros(64), 4)
    assert -1.96 / 66 < low < 0 < high < 1.96 / 66


def test_a_difference_of_two_samples_per_item_by_hand():
    # 4 items and 2 / 2 more: mean 2 / 5, variance (4 x 0.25 + 1 / 2) / 5 - 0.16 = 0.14, half width 1.96 sqrt(0.14 / 5)
    half = 1.959964 * (0.14 / 5) ** 0.5
    assert share_difference_interval(torch.full((4,), 0.5), 2) == pytest.approx((0.4 - half, 0.4 + half), abs=1e-6)


def test_the_bootstrap_interval_of_many_items_is_that_of_a_normal_distribution():
    torch.manual_seed(1)
    values = 5.0 + 3.0 * torch.randn(2000)
    error = float(values.std()) / math.sqrt(2000)
    low, high = mean_interval(values)
    assert (low - values.mean()) / error == pytest.approx(-1.96, abs=0.12)
    assert (high - values.mean()) / error == pytest.approx(1.96, abs=0.12)


def test_the_bootstrap_interval_moves_and_scales_with_the_values():
    values = torch.tensor([1.0, 4.0, 2.0, 8.0, 5.0, 7.0, 1.5, 3.0])
    low, high = mean_interval(values)
    assert mean_interval(10.0 * values - 3.0) == pytest.approx((10.0 * low - 3.0, 10.0 * high - 3.0))
    turned = mean_interval(-values)
    assert turned[0] < -float(values.mean()) < turned[1]
    assert mean_interval(values) == (low, high)
    assert values.min() <= low < values.mean() < high <= values.max()


def test_intervals_of_several_means_are_those_of_each():
    torch.manual_seed(0)
    values = torch.rand(3, 20)
    lows, highs = mean_intervals(values)
    for row, low, high in zip(values, lows, highs, strict=True):
        assert mean_interval(row) == pytest.approx((float(low), float(high)))


def test_many_items_are_resampled_in_parts(monkeypatch):
    values = torch.arange(50.0).square()
    whole = mean_interval(values)
    monkeypatch.setattr("fuchsia_pl.evaluation.intervals.MAX_COUNTS", 5000)
    assert mean_interval(values) == pytest.approx(whole)


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0, 5.0], [0.0, 3.0], [2.0, 2.0]])
def test_few_items_have_an_interval_within_their_values(values):
    low, high = mean_interval(torch.tensor(values))
    assert min(values) <= low <= sum(values) / len(values) <= high <= max(values)


@pytest.mark.parametrize("number", SIZES)
@pytest.mark.parametrize(("a", "b", "num_samples"), [(0.3, 0.7, 4), (2.0, 2.0, 8), (0.5, 4.5, 8), (9.0, 0.5, 4)])
def test_coverage_of_shares_of_several_samples(number, a, b, num_samples):
    torch.manual_seed(0)
    values = successes(beta(a, b, NUM_RUNS, number), num_samples) / num_samples
    ends = [share_interval(row) for row in values]
    assert 0.93 <= covered(*zip(*ends, strict=True), mean=a / (a + b)) <= 0.98


@pytest.mark.parametrize("number", [8, *SIZES])
@pytest.mark.parametrize(("least", "most"), [(0.0, 0.1), (0.0, 1.0), (0.9, 1.0)])
def test_coverage_of_shares_of_one_sample(number, least, most):
    """Counts are whole, so the coverage of a single chance jumps; over the chances of a range it must hold."""
    torch.manual_seed(0)
    chances = least + (most - least) * torch.rand(NUM_RUNS)
    counts = successes(chances, number).long().tolist()
    ends = {right: share_interval(torch.tensor([1.0] * right + [0.0] * (number - right))) for right in set(counts)}
    hits = [ends[right][0] <= chance <= ends[right][1] for right, chance in zip(counts, chances.tolist(), strict=True)]
    assert 0.93 <= sum(hits) / NUM_RUNS <= 0.97


@pytest.mark.parametrize("number", SIZES)
@pytest.mark.parametrize(("num_samples", "gain"), [(1, 0.1), (1, 0.4), (4, 0.1), (8, 0.4)])
def test_coverage_of_differences_of_shares(number, num_samples, gain):
    torch.manual_seed(0)
    chances = beta(0.5, 0.7, NUM_RUNS, number)
    better = chances + gain * (1 - chances)
    values = (successes(better, num_samples) - successes(chances, num_samples)) / num_samples
    ends = [share_difference_interval(row, num_samples) for row in values]
    assert 0.93 <= covered(*zip(*ends, strict=True), mean=gain * (1 - 0.5 / 1.2)) <= 0.975


def lengths(*shape: int) -> torch.Tensor:
    return torch.exp(3.0 + 0.5 * torch.randn(shape))


def rewards(*shape: int) -> torch.Tensor:
    """0, 1, or 1.2 with an answer that ended."""
    return torch.tensor([0.0, 1.0, 1.2])[torch.multinomial(torch.tensor([0.6, 0.1, 0.3]), math.prod(shape), True)].view(
        shape
    )


@pytest.mark.parametrize("number", SIZES)
@pytest.mark.parametrize(
    ("draw", "mean"),
    [(lengths, math.exp(3.125)), (rewards, 0.46), (torch.randn, 0.0)],
    ids=["lengths", "rewards", "normal"],
)
def test_coverage_of_other_means(number, draw, mean):
    torch.manual_seed(0)
    lows, highs = mean_intervals(draw(NUM_RUNS, number))
    upper = 0.99 if number == 16 else 0.98  # three values are coarse for few items
    assert 0.93 <= covered(lows, highs, mean) <= upper
