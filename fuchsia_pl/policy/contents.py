"""Checks of tensors by value: a fingerprint that detects changes, and a search for values that are not finite."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fuchsia_pl.policy.sharding import local

# Key in a checkpoint: the average of the trained weights that was evaluated on the held-out split.
AVERAGED_WEIGHTS = "averaged_weights"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**20  # values converted to 64 bits at a time, which bounds the memory
MULTIPLIER = 0x1E3779B97F4A7C15  # odd, near 2^61 times the golden ratio: spreads positions over all bits


@torch.no_grad()
def fingerprint(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """A hash of the values of each weight; of the local shard if it is sharded.

    Tensor version counters are not enough: writing to `parameter.data` does not change them.

    Args:
        weights: The weights, of any shape.

    >>> weight = torch.zeros(3)
    >>> before = fingerprint([weight])
    >>> weight.data[1] = 1.0
    >>> fingerprint([weight]) == before
    False
    """
    # A small sharded weight may have no values on this rank.
    parts = [part for part in map(local, weights) if part.numel()]
    if not parts:
        return ()
    return tuple(torch.stack([_hash(part) for part in parts]).tolist())  # one transfer


def _hash(part: Tensor) -> Tensor:
    """The sum over all values of (bits as an integer) * (pseudo-random number of the position), modulo 2^64.

    torch.hash_tensor is an XOR: it detects neither permuted values nor two changes of the same bits.
    """
    bits = part.detach().contiguous().view(-1).view(INTEGERS[part.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    for start in range(0, len(bits), CHUNK):
        chunk = bits[start : start + CHUNK].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + len(chunk), device=part.device) * MULTIPLIER
        total += (chunk * ((places ^ (places >> 29)) * MULTIPLIER | 1)).sum()
    return total


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with an infinite or NaN value; of a sharded tensor, the local shard is examined.

    Args:
        tensors: Tensors by name, of any shape, type and device.

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
