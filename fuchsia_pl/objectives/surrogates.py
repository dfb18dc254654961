"""Surrogate losses per token, before any mask or mean, and the ratios that they are of.

Shape letters: B rows, T positions. A log ratio is log pi(token) - log pi_old(token).
"""

from typing import Literal

import torch
from torch import Tensor

Surrogate = Literal["reinforce", "clip", "cispo", "sapo"]
RatioLevel = Literal["token", "sequence", "sequence_token"]

# exp(20) is 5e8: far outside every clip bound, and still finite in float32 when multiplied by an advantage.
MAX_LOG_RATIO = 20.0


def ratio_log(level: RatioLevel, policy_logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """The log of the ratio that a surrogate sees at each token, with gradient.

    "token": the token's own. "sequence": s = the mean over the row's sampled tokens, the same at each of them.
    "sequence_token": s in value, and in gradient the token's own, so that tokens can have advantages of their own. Sources:
    PPO; GSPO, arXiv:2507.18071, equations 7 and 14.

    Args:
        level: Which of the three.
        policy_logprobs: [B, T].
        old_logprobs: [B, T] without gradient.
        loss_mask: bool [B, T].

    >>> policy, mask = torch.tensor([[0.3, 0.1, 0.0]]), torch.tensor([[True, True, False]])
    >>> ratio_log("sequence", policy, torch.zeros(1, 3), mask)
    tensor([[0.2000, 0.2000, 0.2000]])
    """
    log_ratio = policy_logprobs - old_logprobs
    match level:
        case "token":
            return log_ratio
        case "sequence":
            return row_mean(log_ratio, loss_mask).expand_as(log_ratio)
        case "sequence_token":
            return row_mean(log_ratio, loss_mask).detach() + policy_logprobs - policy_logprobs.detach()


def row_mean(values: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean of each row over its sampled tokens, 0 for a row without any; [B, 1]."""
    total = torch.where(loss_mask, values, 0.0).sum(dim=1, keepdim=True)
    return total / loss_mask.sum(dim=1, keepdim=True).clamp(min=1)


def reinforce(policy_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """L_t = -A_t log pi(token). Source: R. Williams, "Simple statistical gradient-following algorithms" (1992).

    >>> reinforce(torch.tensor([[-0.5]]), torch.tensor([[2.0]]))
    tensor([[1.]])
    """
    return -advantages * policy_logprobs


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of PPO with a bound of its own on each side, and a third for what must sink.

    L_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A), r_t = exp(log_ratio); with a dual clip c, and A < 0, no more
    than -c A. Sources: PPO, arXiv:1707.06347, equation 7; separate bounds ("clip-higher"): DAPO, arXiv:2503.14476,
    equation 10; dual clip: arXiv:1912.09729.

    Args:
        log_ratio: [B, T]; gradient flows through it.
        advantages: [B, T].
        clip_low: Distance of the lower bound from 1.
        clip_high: Distance of the upper bound from 1.
        dual_clip: c, above 1; None leaves it out.

    Returns:
        The loss per token [B, T], and a bool [B, T] that is True where a bound took the gradient away.

    >>> loss, clipped = clipped_surrogate(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 2.0]]), 0.2, 0.28)
    >>> loss.tolist(), clipped.tolist()
    ([[-2.0, -2.559999942779541]], [[False, True]])
    """
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    clipped = bounded * advantages < ratio * advantages
    gain = torch.minimum(ratio * advantages, bounded * advantages)
    if dual_clip is not None:
        floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
        clipped = clipped | (gain < floor)
        gain = torch.maximum(gain, floor)
    return -gain, clipped


def cispo(
    log_ratio: Tensor, policy_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """L_t = -sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A log pi(token): the weight is bounded, the gradient never lost.

    sg stops the gradient. Source: CISPO in MiniMax-M1, arXiv:2506.13585, equations 4 and 5.

    Args:
        log_ratio: [B, T].
        policy_logprobs: [B, T]; gradient flows through them.
        advantages: [B, T].
        clip_low: Distance of the lower bound from 1; 1 means no lower bound.
        clip_high: Distance of the upper bound from 1.

    Returns:
        The loss per token [B, T], and a bool [B, T] that is True where the weight was bounded.

    >>> loss, bounded = cispo(torch.tensor([[2.0]]), torch.tensor([[-1.0]]), torch.tensor([[0.5]]), 1.0, 4.0)
    >>> loss.tolist(), bounded.tolist()
    ([[2.5]], [[True]])
    """
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -weight * advantages * policy_logprobs, weight != ratio


def sapo(log_ratio: Tensor, advantages: Tensor, temperature_positive: float, temperature_negative: float) -> Tensor:
    """L_t = -(4 / tau) sigmoid(tau (r_t - 1)) A with tau by the sign of A: a soft gate in place of a hard clip.

    On the policy itself the gradient is -A, as REINFORCE's; away from it, it decays smoothly. Source: SAPO,
    arXiv:2511.20347, equation 6.

    Args:
        log_ratio: [B, T]; gradient flows through it.
        advantages: [B, T].
        temperature_positive: tau where A > 0.
        temperature_negative: tau elsewhere; larger decays faster.

    >>> sapo(torch.tensor([[0.0]]), torch.tensor([[1.5]]), 1.0, 1.05)
    tensor([[-3.]])
    """
    tau = torch.where(advantages > 0, temperature_positive, temperature_negative)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    return -torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau) * advantages
