"""Comparison of two policies on the same items."""

import math
from dataclasses import dataclass

import torch

from fuchsia_pl.evaluation.intervals import mean_interval, share_difference_interval
from fuchsia_pl.evaluation.item_table import ItemTable


@dataclass(frozen=True)
class Difference:
    """A figure of one policy minus that of another, on the same items.

    Attributes:
        name: Name of the figure.
        first: Figure of the first policy.
        second: Figure of the other policy.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end of the 95 % interval of the difference.
        num_higher: Items on which the first policy is higher.
        num_lower: Items on which it is lower.

    >>> str(Difference("rollout/accuracy", 0.65625, 0.15625, 0.36, 0.63, num_higher=36, num_lower=4))
    '0.656 against 0.156: +0.500 [+0.360, +0.630], p = 2e-07'
    """

    name: str
    first: float
    second: float
    low: float
    high: float
    num_higher: int
    num_lower: int

    @property
    def value(self) -> float:
        """The difference."""
        return self.first - self.second

    @property
    def p_value(self) -> float:
        """Of the exact two-sided sign test. For one sample per item that is right or wrong, it is McNemar's exact test."""
        return sign_test(self.num_higher, self.num_lower)

    def __str__(self) -> str:
        """Both figures, the difference with its interval, and the p-value."""
        digits = 3 if max(abs(self.first), abs(self.second)) < 100 else 1
        interval = f"[{self.low:+.{digits}f}, {self.high:+.{digits}f}]"
        return (
            f"{self.first:.{digits}f} against {self.second:.{digits}f}: {self.value:+.{digits}f} {interval}, "
            f"p = {self.p_value:.1g}"
        )


def sign_test(num_higher: int, num_lower: int) -> float:
    """The p-value of the exact two-sided sign test: how likely at least so uneven counts are if both signs are equally likely.

    >>> sign_test(0, 0), sign_test(1, 3), sign_test(5, 0)
    (1.0, 0.625, 0.0625)
    """
    total, term, tail = num_higher + num_lower, 1, 0
    for number in range(min(num_higher, num_lower) + 1):
        tail += term  # C(total, number)
        term = term * (total - number) // (number + 1)
    return min(2 * tail / 2**total, 1.0)


def difference(name: str, first: ItemTable, second: ItemTable, num_samples: int) -> Difference:
    """Compares a figure of two tables.

    Args:
        name: A figure that both tables cover.
        first: The policy that is judged.
        second: The policy that it is compared with.
        num_samples: Samples per item.

    Raises:
        ValueError: The tables have different items.
    """
    if first.items != second.items:
        raise ValueError("the two evaluations have different items, so they cannot be compared item by item")
    differences = first.values(name) - second.values(name)
    are_shares = first.is_share(name) and second.is_share(name)
    low, high = share_difference_interval(differences, num_samples) if are_shares else mean_interval(differences)
    signs = torch.sign(torch.round(first.item_means(name) - second.item_means(name), decimals=9))
    higher, lower = (int((signs == sign).sum()) for sign in (1, -1))  # an item that one side did not score has no sign
    return Difference(name, first.value(name), second.value(name), low, high, higher, lower)


def differences(first: ItemTable, second: ItemTable, num_samples: int) -> list[Difference]:
    """Compares all figures that both tables cover and whose difference is a number."""
    names = [name for name in first.names if first.covers(name) and second.covers(name)]
    found = [difference(name, first, second, num_samples) for name in names]
    return [one for one in found if math.isfinite(one.value)]
