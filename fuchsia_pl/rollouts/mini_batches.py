"""Mini-batches of a phase: the share of its groups that one optimizer step trains on, and the rows of each share."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from fuchsia_pl.samples import RolloutGroup, Sample
from fuchsia_pl.types import Rollout

T = TypeVar("T")


@dataclass(frozen=True)
class MiniBatch:
    """Rows of one mini-batch on one rank.

    Attributes:
        samples: Trainable rows.
        unused: Rollouts of its groups that became no row.

    >>> MiniBatch(samples=(), unused=()).samples
    ()
    """

    samples: tuple[Sample, ...]
    unused: tuple[Rollout, ...]


def split_evenly(values: Sequence[T], number: int) -> list[Sequence[T]]:
    """Cuts a sequence into `number` parts in order, whose lengths differ by at most 1.

    Ranks take turns in the drawn items, so part k of all ranks together is part k of the drawn items.

    >>> split_evenly([4, 7, 9, 11], 2), split_evenly([4, 7, 9], 2)
    ([[4, 7], [9, 11]], [[4], [7, 9]])
    """
    edges = [place * len(values) // number for place in range(number + 1)]
    return [values[start:end] for start, end in itertools.pairwise(edges)]


def split_rows(groups: Sequence[RolloutGroup], samples: Sequence[Sample], number: int) -> list[MiniBatch]:
    """Assigns the rows of a phase to its mini-batches. The rows of a group stay together.

    Args:
        groups: This rank's groups, in the order in which they were drawn.
        samples: Rows of their rollouts, in the same order; some rollouts have none, some several.
        number: Number of mini-batches.
    """
    rows = iter(samples)
    row = next(rows, None)
    mini_batches = []
    for part in split_evenly(groups, number):
        own, unused = [], []
        for rollout in (rollout for group in part for rollout in group.rollouts):
            if row is None or row.rollout is not rollout:
                unused.append(rollout)
            while row is not None and row.rollout is rollout:
                own.append(row)
                row = next(rows, None)
        mini_batches.append(MiniBatch(tuple(own), tuple(unused)))
    assert row is None, "the rows are those of the groups, in order"
    return mini_batches
