"""The objective of a step: corrected surrogate, KL, entropy bonus and value loss, reduced and summed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fuchsia_pl.batch import Batch, PolicyOutput
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.corrections import bounded_weights, sampler_ratio
from fuchsia_pl.objectives.kl import kl_estimate
from fuchsia_pl.objectives.reductions import reduce, token_mean
from fuchsia_pl.objectives.returns import value_loss
from fuchsia_pl.objectives.surrogates import SurrogateInputs, ratio_log


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's share of the step's loss and of its metrics.

    Shares are divided by the whole step's denominators, so their sum over all micro-batches and ranks is the step's value.

    >>> LossOutput(torch.tensor(0.5), {"train/kl": torch.tensor(0.01)}).loss.item()
    0.5
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]


def policy_loss(
    config: LossConfig,
    batch: Batch,
    policy_output: PolicyOutput,
    old_logprobs: Tensor,
    trainer_logprobs: Tensor,
    ref_logprobs: Tensor | None,
) -> LossOutput:
    """The share of one micro-batch in the objective, with its metrics.

    loss = reduce(w_t L_t + beta kl_t) - entropy_weight mean_t(H_t) + value_weight mean_t(L^V_t), where w_t corrects the mismatch
    between sampler and trainer; see `LossConfig`.

    Args:
        config: The objective.
        batch: The micro-batch with the whole step's denominators.
        policy_output: Policy output for the tokens of the batch, with gradient.
        old_logprobs: float32 [B, T], denominator of the ratio with `old_logprobs: trainer`: the trainer's logprobs before the
            first update of these rollouts.
        trainer_logprobs: float32 [B, T], the same without dropout, as an engine computes them; compared with the sampling
            logprobs.
        ref_logprobs: float32 [B, T] without gradient; needed where the KL is in the loss.

    Returns:
        Loss and metrics; the metrics are means over the step's tokens in the forward, or maxima where their name ends in `_max`.
    """
    mask, num_tokens = batch.loss_mask, batch.step.denominators.num_forward_tokens
    # Values outside the mask are arbitrary, and a NaN would survive multiplication by zero in the backward pass.
    logprobs = torch.where(mask, policy_output.logprobs, 0.0)
    old = (old_logprobs if config.old_logprobs == "trainer" else batch.sampling_logprobs).detach()
    values, bounded = _surrogate(config, logprobs, old, torch.where(mask, batch.advantages, 0.0), mask)
    weights, metrics = _correction(config, batch, trainer_logprobs)
    values = weights * values
    metrics["train/clip_fraction"] = token_mean(bounded.float(), mask, num_tokens)
    metrics["train/entropy"] = token_mean(policy_output.entropies.detach(), mask, num_tokens)
    if config.kl_in_loss:
        assert ref_logprobs is not None, "a KL in the loss needs the logprobs of the reference"
        kl = kl_estimate(config.parts.kl_estimator, logprobs, ref_logprobs, old)
        values = values + config.beta * kl
        metrics["train/kl"] = token_mean(kl.detach(), mask, num_tokens)
    parts, denominators = config.parts, batch.step.denominators
    loss = reduce(values, mask, parts.reduction, denominators, parts.constant_length, batch.other_tokens)
    if config.entropy_weight > 0.0:
        loss = loss - config.entropy_weight * token_mean(policy_output.entropies, mask, denominators.num_tokens)
    if policy_output.values is not None:
        assert batch.old_values is not None
        assert batch.value_targets is not None
        losses = value_loss(policy_output.values, batch.old_values, batch.value_targets, config.critic.value_clip)
        critic_loss = token_mean(losses, mask, denominators.num_tokens)
        loss = loss + config.critic.value_weight * critic_loss
        metrics["train/value_loss"] = critic_loss.detach()
    metrics["train/loss"] = loss.detach()
    return LossOutput(loss, metrics)


def logprob_gap(batch: Batch, trainer_logprobs: Tensor) -> Tensor:
    """Share of the micro-batch in the mean over the step's tokens of |trainer logprob - sampling logprob|.

    Args:
        batch: The micro-batch with the whole step's denominators.
        trainer_logprobs: float32 [B, T], see `policy_loss`.
    """
    gap = (trainer_logprobs.detach() - batch.sampling_logprobs).abs()
    return token_mean(gap, batch.loss_mask, batch.step.denominators.num_forward_tokens)


def _surrogate(
    config: LossConfig, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss per token, and a bool that is True where a bound acted."""
    spec = config.surrogate_spec
    level = config.parts.ratio_level if "ratio_level" in spec.uses else "token"
    log_ratio = ratio_log(level, logprobs, old_logprobs, mask)
    return spec.function(SurrogateInputs(logprobs, log_ratio, advantages, mask, config.surrogate_settings))


def _correction(config: LossConfig, batch: Batch, trainer_logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights of the sampler correction, and its metrics before and after the bounds."""
    correction, mask, num_tokens = (
        config.sampler_correction,
        batch.loss_mask,
        batch.step.denominators.num_forward_tokens,
    )
    ratio = sampler_ratio(correction.level, trainer_logprobs, batch.sampling_logprobs, mask)
    weights = bounded_weights(config.correction_mode, ratio, correction.low, correction.high)
    outside = (ratio < correction.low) | (ratio > correction.high)
    metrics = {
        "train/sampler_ratio": token_mean(ratio, mask, num_tokens),
        "train/sampler_ratio_max": torch.where(mask, ratio, 0.0).amax(),
        "train/sampler_weight": token_mean(weights, mask, num_tokens),
        "train/sampler_bounded_fraction": token_mean(outside.float(), mask, num_tokens),
    }
    return weights, metrics
