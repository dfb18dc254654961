"""What the trained weights hold: whether it is the same as before, and where a checkpoint keeps an average of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fuchsia_pl.policy.sharding import local

# In a checkpoint: an average of the trained weights, of which the held-out figures were.
AVERAGED_WEIGHTS = "averaged_weights"


@torch.no_grad()
def fingerprint(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """A hash of the values of each weight, of the part on this rank where it is sharded.

    Versions of tensors do not serve: writing to `parameter.data` leaves them as they are.

    Args:
        weights: The weights, of any shape.

    >>> weight = torch.zeros(3)
    >>> before = fingerprint([weight])
    >>> weight.data[1] = 1.0
    >>> fingerprint([weight]) == before
    False
    """
    # A small weight that is sharded may have no part on this rank, and torch hashes nothing that is empty.
    parts = [part for part in map(local, weights) if part.numel()]
    if not parts:
        return ()
    return tuple(torch.stack([torch.hash_tensor(part).view(torch.int64) for part in parts]).tolist())  # one transfer
