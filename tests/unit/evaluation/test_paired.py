from fractions import Fraction
from math import comb

import pytest
import torch

from fuchsia_pl.evaluation.intervals import mean_interval, share_difference_interval
from fuchsia_pl.evaluation.item_table import ItemTable
from fuchsia_pl.evaluation.paired import difference, differences, sign_test


def test_the_sign_test_is_a_sum_of_binomials():
    for higher in range(12):
        for lower in range(12):
            total = higher + lower
            chances = [Fraction(comb(total, count), 2**total) for count in range(total + 1)]
            # Two-sided: all counts that are at most as likely as the observed one.
            expected = sum((chance for chance in chances if chance <= chances[higher]), Fraction(0))
            assert sign_test(higher, lower) == pytest.approx(float(expected), rel=1e-12)


def test_known_p_values():
    """McNemar's exact test of 36 against 4, and of counts whose powers no float holds."""
    assert sign_test(36, 4) == pytest.approx(2 * sum(comb(40, count) for count in range(5)) / 2**40)
    assert sign_test(5, 0) == 2 / 32
    assert sign_test(0, 0) == 1.0
    assert sign_test(5000, 5000) == 1.0
    assert 0 < sign_test(5200, 4800) < 1e-4


def table(
    values: dict[str, list[float]], sizes: list[float] | None = None, items: list[int] | None = None
) -> ItemTable:
    """A table in which each value is a sum over `sizes` samples."""
    numerators = torch.tensor(list(values.values()), dtype=torch.float64).T
    number = len(numerators)
    ones = torch.tensor(sizes or [1.0] * number, dtype=torch.float64)[:, None]
    return ItemTable(tuple(values), items or list(range(number)), numerators, ones.expand_as(numerators))


def test_a_difference_of_shares_is_paired_by_item():
    first, second = table({"rollout/accuracy": [1, 1, 1, 0]}), table({"rollout/accuracy": [1, 0, 0, 1]})
    found = difference("rollout/accuracy", first, second, 1)
    assert (found.first, found.second, found.value, found.num_higher, found.num_lower) == (0.75, 0.5, 0.25, 2, 1)
    assert (found.low, found.high) == share_difference_interval(torch.tensor([0.0, 1.0, 1.0, -1.0]), 1)
    assert found.p_value == 1.0
    assert str(found).startswith("0.750 against 0.500: +0.250 [")


def test_a_difference_of_rewards_is_bootstrapped_and_a_reward_of_zeros_and_ones_is_a_share():
    values = {"reward/mean": [0.5, 1.5, 2.0, 3.0], "reward/right": [1, 0, 1, 1]}
    other = {"reward/mean": [0.0, 2.0, 1.0, 1.0], "reward/right": [0, 0, 1, 0]}
    mean, right = differences(table(values), table(other), 1)
    assert (mean.low, mean.high) == mean_interval(torch.tensor([0.5, -0.5, 1.0, 2.0]))
    assert (right.low, right.high) == share_difference_interval(torch.tensor([1.0, 0.0, 0.0, 1.0]), 1)


def test_items_that_were_not_scored_have_no_sign():
    """Three samples, none, one; the differences of the linearized values have the difference of the figures as their mean."""
    first = table({"reward/judge": [3.0, 0.0, 0.5]}, sizes=[3.0, 0.0, 1.0])
    second = table({"reward/judge": [1.0, 0.2, 0.5]}, sizes=[3.0, 1.0, 1.0])
    found = difference("reward/judge", first, second, 3)
    assert (found.first, found.second) == (3.5 / 4, 1.7 / 5)
    assert (found.num_higher, found.num_lower) == (1, 0)
    assert float((first.values("reward/judge") - second.values("reward/judge")).mean()) == pytest.approx(found.value)


def test_only_figures_of_both_tables_are_compared():
    first, second = table({"a": [1.0, 2.0], "maj@2": [1.0, 1.0]}), table({"a": [1.0, 2.0]})
    assert [one.name for one in differences(first, second, 2)] == ["a"]
    with pytest.raises(ValueError, match="different items"):
        difference("a", first, table({"a": [1.0, 2.0]}, items=[3, 4]), 1)
