"""What the trained weights hold: whether it is the same as before and finite, and where a checkpoint keeps an average of it."""

from collections.abc import Mapping, Sequence

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


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors with a value that is infinite or NaN, in the part on this rank where they are sharded.

    Args:
        tensors: By name, of any shape, type and device.

    >>> not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.inf]), "c": torch.zeros(0), "step": torch.tensor(3)})
    ['b']
    """
    parts = {name: local(tensor) for name, tensor in tensors.items()}
    checked = {name: part for name, part in parts.items() if part.is_floating_point()}
    if not checked:
        return []
    device = next(iter(checked.values())).device
    found = torch.stack([part.isfinite().all().to(device) for part in checked.values()]).tolist()  # one transfer
    return [name for name, is_finite in zip(checked, found, strict=True) if not is_finite]
