"""Penalties that are added to rewards before credit assignment."""

from torch import Tensor


def overlong_penalty(num_tokens: Tensor, max_tokens: int, buffer_tokens: int) -> Tensor:
    """Soft length penalty: 0 up to max - buffer, then linear down to -1 at max.

    Source: DAPO, arXiv:2503.14476, equation 13.

    Args:
        num_tokens: Lengths of completions, any shape.
        max_tokens: Longest completion allowed.
        buffer_tokens: Length of the slope, 1 to `max_tokens`.

    >>> import torch
    >>> overlong_penalty(torch.tensor([6, 8, 9, 10]), max_tokens=10, buffer_tokens=4)
    tensor([ 0.0000, -0.5000, -0.7500, -1.0000], dtype=torch.float64)
    """
    return ((max_tokens - buffer_tokens - num_tokens.double()) / buffer_tokens).clamp(-1.0, 0.0)
