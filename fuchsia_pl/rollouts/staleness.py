"""Which rows are too old to be trained on, and how old the rest is."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fuchsia_pl.types import Sample

NO_VERSION = torch.iinfo(torch.int64).max


def drop_stale(samples: list[Sample], step: int, max_staleness: int) -> list[Sample]:
    """Without the rows that are too old. Where none may be old, one that is means a mistake, and the module says so.

    Args:
        samples: This rank's rows.
        step: The optimizer step that they are for.
        max_staleness: Optimizer steps by which the weights that sampled them may be older.
    """
    if max_staleness == 0:
        return samples
    return [sample for sample in samples if sample.rollout.policy_version >= step - max_staleness]


def oldest_version(samples: Sequence[Sample], of_rollouts: int, lowest: Callable[[Tensor], Tensor]) -> int:
    """The oldest policy version of all ranks' rows: what depends on it is decided alike everywhere.

    Args:
        samples: This rank's rows.
        of_rollouts: The oldest of all its rollouts. Where every row is too old, that is no accident and this is returned.
        lowest: The smallest of a tensor's values over all ranks.

    >>> oldest_version([], of_rollouts=3, lowest=lambda versions: versions)
    3
    """
    own = min((sample.rollout.policy_version for sample in samples), default=NO_VERSION)
    of_rows, of_all = lowest(torch.tensor([own, of_rollouts])).tolist()
    return of_all if of_rows == NO_VERSION else of_rows
