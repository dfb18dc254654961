"""Corrections of the mismatch between sampler and trainer, which compute different probabilities for the same weights.

Each token's (or row's) loss is weighted by pi_trainer / pi_sampler, bounded. Both are computed with the weights that
sampled, so the correction does not depend on later updates. Sources: truncated importance sampling, F. Yao et al., "Your
efficient RL framework secretly brings you off-policy RL training" (2025); masked and geometric forms: J. Liu et al., "When
speed kills stability" (2025).

Shape letters: B rows, T positions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fuchsia_pl.objectives.surrogates import MAX_LOG_RATIO, row_mean
from fuchsia_pl.types import ConfigError

CorrectionMode = Literal["disabled", "truncate", "mask"]
CorrectionLevel = Literal["token", "sequence", "geometric"]


@dataclass
class SamplerCorrection:
    """Settings of the weights pi_trainer / pi_sampler.

    Attributes:
        mode: "truncate" clamps the weight to the bounds, "mask" sets it to 0 outside of them, "disabled" sets all weights to 1.
            None: "truncate", or "disabled" where `old_logprobs` is "sampler", whose ratio contains the mismatch already.
        level: "token" weighs each token by its own ratio, "sequence" each row by the product over its tokens, "geometric"
            each row by the geometric mean.
        low: Lower bound; 0 is none.
        high: Upper bound.
    """

    mode: CorrectionMode | None = None
    level: CorrectionLevel = "token"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        """Raises ConfigError where the weight 1 is not between the bounds."""
        if not 0.0 <= self.low < 1.0 < self.high:
            raise ConfigError(
                f"model.loss.sampler_correction needs 0 <= low < 1 < high, got low={self.low} and high={self.high}: where "
                "sampler and trainer agree the weight is 1"
            )


def sampler_ratio(
    level: CorrectionLevel, trainer_logprobs: Tensor, sampling_logprobs: Tensor, loss_mask: Tensor
) -> Tensor:
    """pi_trainer / pi_sampler of each token, or of its row.

    Args:
        level: See `SamplerCorrection`.
        trainer_logprobs: [B, T], computed by the trainer with the weights that sampled.
        sampling_logprobs: [B, T], computed by the engine.
        loss_mask: bool [B, T].

    Returns:
        [B, T] without gradient. A NaN sampling logprob of a sampled token gives NaN: an unknown probability must be detected.

    >>> old, mask = torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, True]])
    >>> sampler_ratio("sequence", old, old - 0.5, mask)
    tensor([[2.7183, 2.7183]])
    """
    log_ratio = torch.where(loss_mask, trainer_logprobs - sampling_logprobs, 0.0).detach()
    match level:
        case "token":
            logs = log_ratio
        case "sequence":
            logs = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
        case "geometric":
            logs = row_mean(log_ratio, loss_mask).expand_as(log_ratio)
    return logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def bounded_weights(mode: CorrectionMode, ratio: Tensor, low: float, high: float) -> Tensor:
    """Weights of the losses: `ratio` within its bounds.

    Args:
        mode: See `SamplerCorrection`.
        ratio: Any shape.
        low: Lower bound.
        high: Upper bound.

    >>> ratio = torch.tensor([0.1, 1.0, 3.0])
    >>> bounded_weights("truncate", ratio, 0.5, 2.0).tolist(), bounded_weights("mask", ratio, 0.5, 2.0).tolist()
    ([0.5, 1.0, 2.0], [0.0, 1.0, 0.0])
    """
    match mode:
        case "disabled":
            return torch.ones_like(ratio)
        case "truncate":
            return ratio.clamp(low, high)
        case "mask":
            return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
