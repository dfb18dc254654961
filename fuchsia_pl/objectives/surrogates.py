"""Surrogate losses per token, before any mask or mean."""

import torch
from torch import Tensor

# exp(20) is 5e8: far outside every clip bound, and still finite in float32 when multiplied by an advantage.
MAX_LOG_RATIO = 20.0


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of PPO with a bound of its own on each side.

    L_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A), r_t = exp(log_ratio). Sources: PPO, arXiv:1707.06347,
    equation 7; separate bounds ("clip-higher"): DAPO, arXiv:2503.14476, equation 10.

    Args:
        log_ratio: log pi(token) - log pi_old(token), [B, T]; gradient flows through it.
        advantages: [B, 1] or [B, T].
        clip_low: Distance of the lower bound from 1.
        clip_high: Distance of the upper bound from 1.

    Returns:
        The loss per token [B, T], and a bool [B, T] that is True where the clip took the gradient away.

    >>> loss, clipped = clipped_surrogate(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0]]), 0.2, 0.28)
    >>> loss.tolist(), clipped.tolist()
    ([[-2.0, -2.559999942779541]], [[False, True]])
    """
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    clipped = bounded * advantages < ratio * advantages
    return -torch.minimum(ratio * advantages, bounded * advantages), clipped
