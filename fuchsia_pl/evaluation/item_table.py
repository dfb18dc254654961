"""Sums of each item on all ranks, from which figures and comparisons are computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

Fractions = Mapping[str, tuple[float, float]]
SHARE_NAMES = ("rollout/accuracy", "mean@", "pass@", "maj@")
KINDS = (
    "reward",
    "rollout",
)  # first word of the figures in total; that of other names with a slash is a part of a mixture


def split_name(figure: str) -> tuple[str, str]:
    """The prefix of the part of a mixture, "" for a figure in total, and the rest of a figure's name.

    >>> split_name("sums/rollout/accuracy"), split_name("sums/maj@4"), split_name("reward/mean"), split_name("maj@4")
    (('sums/', 'rollout/accuracy'), ('sums/', 'maj@4'), ('', 'reward/mean'), ('', 'maj@4'))
    """
    first, slash, rest = figure.partition("/")
    return ("", figure) if not slash or first in KINDS else (f"{first}/", rest)


@dataclass(frozen=True)
class ItemTable:
    """Numerator and denominator of each figure for each item.

    A figure is the sum of its numerators divided by the sum of its denominators. The denominator of an item is the number of its
    samples that the figure covers, so it is 0 for an item that a reward function did not score.

    Attributes:
        names: Names of the figures, [F].
        items: Positions of the items, ascending, [N].
        numerators: [N, F], float64.
        denominators: [N, F], float64.

    >>> table = ItemTable(("reward/mean",), [4, 7], torch.tensor([[3.0], [0.5]]), torch.tensor([[2.0], [1.0]]))
    >>> round(table.value("reward/mean"), 3), round(table.values("reward/mean").mean().item(), 3)
    (1.167, 1.167)
    """

    names: tuple[str, ...]
    items: list[int]
    numerators: Tensor
    denominators: Tensor

    def value(self, name: str) -> float:
        """The figure; NaN if it covers no sample."""
        numerators, denominators = self._columns(name)
        # Python adds from left to right: the same digits as the sum over the rollouts of one rank.
        number = sum(denominators.tolist())
        return sum(numerators.tolist()) / number if number else float("nan")

    def values(self, name: str) -> Tensor:
        """One value per item, whose mean is the figure, [N].

        If all items have the same number of samples, these are the means of the items. In general they are the linearized
        values of the ratio: an item without samples has the value of the figure.
        """
        numerators, denominators = self._columns(name)
        ratio = numerators.sum() / denominators.sum()
        return ratio + (numerators - ratio * denominators) * len(self.items) / denominators.sum()

    def item_means(self, name: str) -> Tensor:
        """The mean of the samples of each item, NaN for an item without any, [N]."""
        numerators, denominators = self._columns(name)
        return numerators / denominators

    def is_share(self, name: str) -> bool:
        """Whether the samples of a figure are 0 or 1: a share by its definition, or a reward that was 0 or 1 throughout."""
        own = split_name(name)[1]
        if own.startswith(SHARE_NAMES) or own.endswith("_fraction"):
            return True
        numerators, denominators = self._columns(name)
        is_whole = numerators == numerators.round()
        return own.startswith("reward/") and bool((is_whole & (numerators >= 0) & (numerators <= denominators)).all())

    def covers(self, name: str) -> bool:
        """Whether the table has the figure, for at least one sample."""
        return name in self.names and bool(self._columns(name)[1].sum() > 0)

    def _columns(self, name: str) -> tuple[Tensor, Tensor]:
        column = self.names.index(name)
        return self.numerators[:, column], self.denominators[:, column]


class ItemSums(Metric):
    """Collects the sums of each item; `table` returns those of all ranks in the order of the items.

    The table, and all that is computed from it, is therefore the same for any number of ranks.

    Args:
        names: Names of the figures, the same on all ranks.

    >>> sums = ItemSums(["reward/mean"])
    >>> sums.update([7, 4], [{"reward/mean": (0.5, 1.0)}, {"reward/mean": (3.0, 2.0)}])
    >>> sums.table().items
    [4, 7]
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, items: Sequence[int], fractions: Sequence[Fractions]) -> None:
        """Adds items with their numerators and denominators."""
        for item, figures in zip(items, fractions, strict=True):
            pairs = [figures[name] for name in self.names]
            row = [float(item), *(pair[0] for pair in pairs), *(pair[1] for pair in pairs)]
            self.rows.append(torch.tensor([row], dtype=torch.float64, device=self.device))

    def compute(self) -> Tensor:
        """The rows of all ranks in the order of the items, [N, 1 + 2 F]."""
        rows = dim_zero_cat(self.rows)
        return rows[rows[:, 0].argsort()]

    def table(self) -> ItemTable:
        """The table of all ranks. All ranks must call it at the same time.

        Raises:
            RuntimeError: An item was added twice.
        """
        rows = self.compute().cpu()
        items = [int(item) for item in rows[:, 0].tolist()]
        if len(set(items)) < len(items):
            raise RuntimeError("an evaluation has an item twice: the ranks do not share the items")
        middle = 1 + len(self.names)
        return ItemTable(self.names, items, rows[:, 1:middle], rows[:, middle:])
