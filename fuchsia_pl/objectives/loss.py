"""The objective of a step: surrogate plus weighted KL, reduced."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fuchsia_pl.objectives.kl import KLEstimator, kl_estimate
from fuchsia_pl.objectives.reductions import Reduction, reduce, token_mean
from fuchsia_pl.objectives.surrogates import clipped_surrogate
from fuchsia_pl.types import Batch, ConfigError, LossOutput


@dataclass
class LossConfig:
    """What is optimised.

    Attributes:
        clip_low: A token whose probability ratio fell below 1 - clip_low is pushed down no further.
        clip_high: A token whose probability ratio rose above 1 + clip_high is pushed up no further.
        old_logprobs: Denominator of that ratio. "trainer": the policy's own logprobs before the update, so with one update
            per batch the ratio is exactly 1 and the bounds never act. "sampler": the engine's logprobs, so the bounds also
            catch tokens on which engine and trainer disagree.
        beta: Weight of the KL to the reference; 0 skips the reference forward.
        kl_estimator: Which estimator of that KL.
        reduction: "token_mean" weighs tokens alike, "sequence_mean" completions alike, "constant" divides by the longest
            completion allowed.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    beta: float = 0.0
    kl_estimator: KLEstimator = "k3"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        """Refuses bounds and weights that turn the objective around."""
        if not 0.0 < self.clip_low <= 1.0:
            raise ConfigError(f"model.loss.clip_low must be above 0 and at most 1, got {self.clip_low}")
        if self.clip_high <= 0.0:
            raise ConfigError(f"model.loss.clip_high must be above 0, got {self.clip_high}")
        if self.beta < 0.0:
            raise ConfigError(
                f"model.loss.beta must be 0 or more, got {self.beta}: a negative weight rewards drifting away"
            )


def policy_loss(config: LossConfig, batch: Batch, policy_logprobs: Tensor, ref_logprobs: Tensor | None) -> LossOutput:
    """The objective's share of one micro-batch, with its metrics.

    loss = reduce(L_clip + beta * kl), see `clipped_surrogate`, `kl_estimate` and `reduce`.

    Args:
        config: The objective.
        batch: The micro-batch with the whole step's denominators.
        policy_logprobs: float32 [B, T], with gradient.
        ref_logprobs: float32 [B, T] without gradient; needed where beta is not 0.

    Returns:
        Loss and metrics; the metrics are means over the step's tokens.
    """
    mask, num_tokens = batch.loss_mask, batch.denominators.num_tokens
    old_logprobs = policy_logprobs.detach() if config.old_logprobs == "trainer" else batch.sampling_logprobs
    # Outside the mask a logprob means nothing; a NaN there would survive multiplication by zero in the backward pass.
    log_ratio = torch.where(mask, policy_logprobs - old_logprobs, 0.0)
    values, clipped = clipped_surrogate(log_ratio, batch.advantages.unsqueeze(1), config.clip_low, config.clip_high)
    metrics = {"train/clip_fraction": token_mean(clipped.float(), mask, num_tokens)}
    if ref_logprobs is not None:
        kept = torch.where(mask, policy_logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0)
        kl = kl_estimate(config.kl_estimator, *kept)
        values = values + config.beta * kl
        metrics["train/kl"] = token_mean(kl.detach(), mask, num_tokens)
    loss = reduce(values, mask, config.reduction, batch.denominators)
    metrics["train/loss"] = loss.detach()
    return LossOutput(loss, metrics)


def logprob_gap(batch: Batch, policy_logprobs: Tensor) -> Tensor:
    """The micro-batch's share of the mean over the step's tokens of |policy logprob - sampling logprob|.

    Args:
        batch: The micro-batch with the whole step's denominators.
        policy_logprobs: float32 [B, T] before the update.
    """
    gap = (policy_logprobs.detach() - batch.sampling_logprobs).abs()
    return token_mean(gap, batch.loss_mask, batch.denominators.num_tokens)
