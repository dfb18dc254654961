"""Figures of a step's rollouts. README lists each with its formula.

A figure is kept as numerator and denominator, so that over ranks with different numbers of rollouts it is the mean over all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.types import Rollout, RolloutGroup, RolloutStatus

Fractions = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class StepRecord:
    """What a training step made of its rollouts on this rank.

    Attributes:
        kept: The groups that are trained on.
        dropped: Those without spread that dynamic sampling replaced, or found nothing to replace with.
        num_refills: Groups sampled to replace others.
        num_trained: Rollouts that became trainable rows.
        seconds: Of sampling and scoring.
        kl: With the KL in the reward, its sum over the sampled tokens of the kept groups, and their number.
    """

    kept: Sequence[RolloutGroup]
    dropped: Sequence[RolloutGroup]
    num_refills: int
    num_trained: int
    seconds: float
    kl: tuple[float, float] | None = None


def reward_fractions(rollouts: Sequence[Rollout], environment: Environment) -> Fractions:
    """Of the total, of each reward by name, of being right, of length and of truncation."""
    number = float(len(rollouts))
    totals = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    truncated = sum(rollout.status is RolloutStatus.TRUNCATED for rollout in rollouts)
    found: Fractions = {
        "reward/mean": (sum(totals), len(totals)),
        "rollout/accuracy": (sum(environment.is_correct(rollout) for rollout in rollouts), number),
        "rollout/completion_tokens": (sum(rollout.num_sampled_tokens for rollout in rollouts), number),
        "rollout/truncated_fraction": (truncated, number),
    }
    for name in rollouts[0].rewards:
        values = [value for rollout in rollouts if (value := rollout.rewards[name]) is not None]
        found[f"reward/{name}"] = (sum(values), len(values))
    return found


def step_fractions(step: StepRecord, environment: Environment, world_size: int) -> Fractions:
    """The figures of a training step. Counts have the denominator 1 / world_size, so that over ranks they add up."""
    groups = [*step.kept, *step.dropped]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    share = 1.0 / world_size
    num_kept_rollouts = sum(len(group.rollouts) for group in step.kept)
    found = {
        **reward_fractions(rollouts, environment),
        "rollout/zero_variance_groups": (float(sum(not group.has_spread for group in groups)), share),
        "rollout/refilled_groups": (float(step.num_refills), share),
        "rollout/dropped_groups": (float(len(step.dropped)), share),
        "rollout/untrained": (float(num_kept_rollouts - step.num_trained), share),
        "perf/rollout_tokens_per_s": (
            float(sum(rollout.num_sampled_tokens for rollout in rollouts)),
            step.seconds / world_size,
        ),
    }
    if step.kl is not None:
        found["train/kl"] = step.kl
    return found


def over_ranks(fractions: Mapping[str, tuple[float, float]], add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The figures themselves; one without anything to be a mean of is NaN.

    Args:
        fractions: This rank's.
        add_up: Adds a tensor up over all ranks.

    >>> over_ranks({"reward/mean": (3.0, 4), "reward/judge": (0.0, 0)}, add_up=lambda values: values)
    {'reward/mean': 0.75, 'reward/judge': nan}
    """
    totals = add_up(torch.tensor(list(fractions.values()), dtype=torch.float64)).tolist()
    return {
        name: numerator / denominator if denominator else float("nan")
        for name, (numerator, denominator) in zip(fractions, totals, strict=True)
    }
