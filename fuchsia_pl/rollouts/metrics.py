"""Metrics of a phase's rollouts. README lists each with its formula.

A metric is stored as numerator and denominator. So its value over ranks with different numbers of rollouts is the mean over all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.parts import reward_names
from fuchsia_pl.envs.tools.spec import TOOL_CALLS
from fuchsia_pl.envs.user_code import user_code
from fuchsia_pl.rollouts.credit import OVERLONG
from fuchsia_pl.rollouts.dynamic import Sampled
from fuchsia_pl.rollouts.scoring import REWARD_ERRORS
from fuchsia_pl.types import Rollout, RolloutStatus

Fractions = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class PhaseCounts:
    """Sampled groups of a phase on this rank, and what they were used for.

    Attributes:
        sampled: The groups.
        num_trained: Rollouts that became trainable rows.
        num_zero_advantage: Trainable rows that cannot change any weight and do not enter the forward.
        num_dropped_prompts: Training items that are never drawn because their prompts are too long.
        kl: With the KL in the reward: its sum over the sampled tokens of the kept groups, and the number of these tokens.
        num_stale: Rows that were dropped because the weights that sampled them are older than allowed.
        teacher: Metrics of the teacher, see `teacher_fractions`.

    >>> PhaseCounts(Sampled(kept=[], dropped=[], num_refills=0), num_trained=0, num_zero_advantage=0).num_stale
    0
    """

    sampled: Sampled
    num_trained: int
    num_zero_advantage: int
    num_dropped_prompts: int = 0
    kl: tuple[float, float] | None = None
    num_stale: int = 0
    teacher: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def reward_fractions(rollouts: Sequence[Rollout], environment: Environment, world_size: int) -> Fractions:
    """Metrics of rewards, accuracy, lengths, ends of rollouts, and counters.

    Raises:
        ValueError: A rollout has a counter that the environment does not declare. Ranks need the same names.
    """
    correct = are_correct(rollouts, environment)
    counts = count_fractions(rollouts, environment, world_size)
    if not environment.mixed:
        return {**rate_fractions(rollouts, correct), **counts}
    places: dict[str, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        places.setdefault(rollout.part, []).append(place)
    rates = {
        name: rate_fractions([rollouts[place] for place in own], [correct[place] for place in own])
        for name, own in places.items()
    }
    return {**in_parts(rates, environment), **counts}


def are_correct(rollouts: Sequence[Rollout], environment: Environment) -> list[bool]:
    """Whether the environment takes each rollout for correct."""
    with user_code(f"{type(environment).__name__}.is_correct"):
        return [bool(environment.is_correct(rollout)) for rollout in rollouts]


def rate_fractions(rollouts: Sequence[Rollout], correct: Sequence[bool]) -> Fractions:
    """Metrics that are means over rollouts: rewards, accuracy, lengths, ends of rollouts.

    Args:
        rollouts: At least one.
        correct: Whether each is correct.
    """
    number = float(len(rollouts))
    totals = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    num_environment = sum(
        len(row.token_ids) - row.num_prompt_tokens - row.num_sampled_tokens for r in rollouts for row in r.rows
    )
    found: Fractions = {
        "reward/mean": (sum(totals), len(totals)),
        "rollout/accuracy": (sum(correct), number),
        "rollout/completion_tokens": (sum(rollout.num_sampled_tokens for rollout in rollouts), number),
        "rollout/environment_tokens": (num_environment, number),
        "rollout/turns": (sum(len(rollout.all_turns) for rollout in rollouts), number),
    }
    for status in (RolloutStatus.TRUNCATED, RolloutStatus.TOOL_ERROR, RolloutStatus.ENV_ERROR):
        found[f"rollout/{status}_fraction"] = (sum(rollout.status is status for rollout in rollouts), number)
    for name in rollouts[0].rewards:
        values = [value for rollout in rollouts if (value := rollout.rewards[name]) is not None]
        found[f"reward/{name}"] = (sum(values), len(values))
    return found


def count_fractions(rollouts: Sequence[Rollout], environment: Environment, world_size: int) -> Fractions:
    """Counters, summed over ranks, and the share of the rollouts that called a tool."""
    with user_code(f"{type(environment).__name__}.counter_names"):
        names = [REWARD_ERRORS, *environment.counter_names()]
    undeclared = sorted({name for rollout in rollouts for name in rollout.counts} - set(names))
    if undeclared:
        raise ValueError(
            f"rollouts of {type(environment).__name__} count {undeclared}, which its counters {names} do not name: add them to "
            "self.counters, or to the attribute `counters` of the reward function"
        )
    found: Fractions = {
        f"count/{name}": (float(sum(rollout.counts[name] for rollout in rollouts)), 1.0 / world_size) for name in names
    }
    if TOOL_CALLS in names:
        found["rollout/tool_use"] = (sum(rollout.counts[TOOL_CALLS] > 0 for rollout in rollouts), float(len(rollouts)))
    for name, part in environment.mixed.items():
        own = count_fractions([r for r in rollouts if r.part == name], part.environment, world_size)
        found |= {f"{name}/{metric}": pair for metric, pair in own.items()}
    return found


def in_parts(rates: Mapping[str, Mapping[str, tuple[float, float]]], environment: Environment) -> Fractions:
    """Metrics of a mixture: in total, then of each part as `part/metric`. All ranks get the same names.

    Args:
        rates: Metrics of the rollouts of each part by its name, at least of one part. Parts without rollouts get 0 / 0.
        environment: The mixture. Its parts' rewards are not comparable, so the total has no rewards by name.
    """
    names = [name for name in next(iter(rates.values())) if not _is_by_name(name)]
    found: Fractions = {name: _sum([of_part[name] for of_part in rates.values()]) for name in names}
    for part in environment.mixed:
        rewards = [f"reward/{name}" for name in reward_names(environment.mixed[part].environment)]
        own = rates.get(part, {})
        found |= {f"{part}/{name}": own.get(name, (0.0, 0.0)) for name in [*names, *rewards]}
    return found


def _is_by_name(metric: str) -> bool:
    return metric.startswith("reward/") and metric not in ("reward/mean", f"reward/{OVERLONG}")


def _sum(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(numerator for numerator, _ in pairs), sum(denominator for _, denominator in pairs)


def step_fractions(counts: PhaseCounts, environment: Environment, world_size: int) -> Fractions:
    """Metrics of a phase's rollouts. Counts have the denominator 1 / world_size, so that their value is the sum over ranks."""
    sampled, rollouts = counts.sampled, counts.sampled.rollouts
    share = 1.0 / world_size
    num_kept_rollouts = sum(len(group.rollouts) for group in sampled.kept)
    found = {
        **reward_fractions(rollouts, environment, world_size),
        **_group_counts(sampled, environment, share),
        "rollout/refilled_groups": (float(sampled.num_refills), share),
        "rollout/dropped_groups": (float(len(sampled.dropped)), share),
        "rollout/dropped_prompts": (float(counts.num_dropped_prompts), 1.0),
        "rollout/untrained": (float(num_kept_rollouts - counts.num_trained), share),
        "rollout/zero_advantage": (float(counts.num_zero_advantage), share),
        "rollout/stale": (float(counts.num_stale), share),
        "rollout/staleness": _staleness(rollouts),
        "perf/rollout_tokens_per_s": (
            float(sum(rollout.num_sampled_tokens for rollout in rollouts)),
            sampled.seconds / world_size,
        ),
    }
    if counts.kl is not None:
        found["train/kl"] = counts.kl
    return {**found, **counts.teacher}


def _group_counts(sampled: Sampled, environment: Environment, share: float) -> Fractions:
    """Number of groups without spread; for each part of a mixture also the number of its groups."""
    groups, name = sampled.groups, "rollout/zero_variance_groups"
    found: Fractions = {name: (float(sum(not group.has_spread for group in groups)), share)}
    for part in environment.mixed:
        own = [group for group in groups if group.rollouts[0].part == part]
        found[f"{part}/{name}"] = (float(sum(not group.has_spread for group in own)), share)
        found[f"{part}/rollout/groups"] = (float(len(own)), share)
    return found


def _staleness(rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Optimizer steps between the weights that sampled a token and the step it is for, summed over tokens; number of tokens."""
    lags = [r.step - version for r in rollouts if r.step is not None for version in r.policy_versions if version >= 0]
    return float(sum(lags)), float(len(lags))


def over_ranks(fractions: Mapping[str, tuple[float, float]], add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Values of metrics over all ranks. A metric with the denominator 0 is NaN.

    Args:
        fractions: Numerators and denominators of this rank.
        add_up: Sums a tensor over all ranks.

    >>> over_ranks({"reward/mean": (3.0, 4), "reward/judge": (0.0, 0)}, add_up=lambda values: values)
    {'reward/mean': 0.75, 'reward/judge': nan}
    """
    totals = add_up(torch.tensor(list(fractions.values()), dtype=torch.float64)).tolist()
    return {
        name: numerator / denominator if denominator else float("nan")
        for name, (numerator, denominator) in zip(fractions, totals, strict=True)
    }
