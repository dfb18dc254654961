"""What the trained weights hold: whether it is the same as before, and where a checkpoint keeps an average of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fuchsia_pl.policy.sharding import local

# In a checkpoint: an average of the trained weights, of which the held-out figures were.
AVERAGED_WEIGHTS = "averaged_weights"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**20  # values at a time, which bounds the memory for their 64 bits each
MULTIPLIER = 0x1E3779B97F4A7C15  # odd, near 2^61 times the golden ratio: spreads places over all bits


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
    # A small weight that is sharded may have no part on this rank.
    parts = [part for part in map(local, weights) if part.numel()]
    if not parts:
        return ()
    return tuple(torch.stack([_hash(part) for part in parts]).tolist())  # one transfer


def _hash(part: Tensor) -> Tensor:
    """The sum over all values of (their bits as an integer) * (a pseudo-random number of their place), modulo 2^64.

    torch.hash_tensor is an XOR: it does not see permuted values, nor two changes of the same bits.
    """
    bits = part.detach().contiguous().view(-1).view(INTEGERS[part.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    for start in range(0, len(bits), CHUNK):
        chunk = bits[start : start + CHUNK].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + len(chunk), device=part.device) * MULTIPLIER
        total += (chunk * ((places ^ (places >> 29)) * MULTIPLIER | 1)).sum()
    return total
