"""Removes rows that are too old for training, and finds the oldest version of the rest."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fuchsia_pl.samples import Sample

NO_VERSION = torch.iinfo(torch.int64).max


def drop_stale(samples: list[Sample], step: int, max_staleness: int) -> list[Sample]:
    """Returns the rows that are not too old.

    With `max_staleness` 0, all rows are returned: an old row is an error then, which the module raises.

    Args:
        samples: This rank's rows.
        step: The optimizer step that the rows are for.
        max_staleness: Largest allowed age of the weights that sampled them, in optimizer steps.
    """
    if max_staleness == 0:
        return samples
    return [sample for sample in samples if sample.rollout.policy_version >= step - max_staleness]


def oldest_version(samples: Sequence[Sample], of_rollouts: int, lowest: Callable[[Tensor], Tensor]) -> int:
    """The oldest policy version of the rows of all ranks. All ranks get the same value.

    Args:
        samples: This rank's rows.
        of_rollouts: The oldest version of all its rollouts, which is returned if no rank has a row.
        lowest: Minimum of a tensor over all ranks.

    >>> oldest_version([], of_rollouts=3, lowest=lambda versions: versions)
    3
    """
    own = min((sample.rollout.policy_version for sample in samples), default=NO_VERSION)
    of_rows, of_all = lowest(torch.tensor([own, of_rollouts])).tolist()
    return of_all if of_rows == NO_VERSION else of_rows
