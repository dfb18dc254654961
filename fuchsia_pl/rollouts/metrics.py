"""Figures of a step's rollouts. README lists each with its formula."""

from collections.abc import Sequence
from statistics import fmean

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.types import Rollout, RolloutGroup, RolloutStatus

# Over several ranks these are added up; all others are means.
SUMMED_METRICS = ("rollout/zero_variance_groups", "perf/rollout_tokens_per_s")


def reward_metrics(rollouts: Sequence[Rollout], environment: Environment) -> dict[str, float]:
    """Means over rollouts of the total, of each reward by name, of being right, of length and of truncation."""
    metrics = {
        "reward/mean": fmean(rollout.reward for rollout in rollouts),
        "rollout/accuracy": fmean(environment.is_correct(rollout) for rollout in rollouts),
        "rollout/completion_tokens": fmean(rollout.num_sampled_tokens for rollout in rollouts),
        "rollout/truncated_fraction": fmean(rollout.status is RolloutStatus.TRUNCATED for rollout in rollouts),
    }
    for name in rollouts[0].rewards:
        metrics[f"reward/{name}"] = fmean(rollout.rewards[name] for rollout in rollouts)
    return metrics


def step_metrics(groups: Sequence[RolloutGroup], environment: Environment, seconds: float) -> dict[str, float]:
    """The figures of a training step's groups, sampled and scored in `seconds`."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        **reward_metrics(rollouts, environment),
        "rollout/zero_variance_groups": float(sum(not group.has_spread for group in groups)),
        "perf/rollout_tokens_per_s": sum(rollout.num_sampled_tokens for rollout in rollouts) / seconds,
    }
