"""Runs an environment's reward functions over a group of siblings."""

import json
import logging
import math
from typing import Any

from fuchsia_pl.envs.base import Environment, RewardFunction, reward_name, total_reward, weights_at
from fuchsia_pl.envs.bounded import call_bounded
from fuchsia_pl.types import Rollout, RolloutStatus

# Counted where `on_error` is "unscored"; the environment need not name it.
REWARD_ERRORS = "reward_errors"
# These ended through no doing of the policy.
UNSCORED = (RolloutStatus.TOOL_ERROR, RolloutStatus.ENV_ERROR, RolloutStatus.ABORTED)

logger = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """A reward function raised, hung, or returned what is no reward."""


async def score_group(environment: Environment, rollouts: list[Rollout]) -> None:
    """Fills `rewards` and `reward` of the siblings of one item.

    Rollouts that ended through no doing of the policy are not shown to the reward functions and stay unscored.

    Raises:
        RewardError: With the function's name and the item; the cause is chained. Where the environment's `on_error` is
            "unscored", all siblings are left unscored and counted instead.
    """
    scored = [rollout for rollout in rollouts if rollout.status not in UNSCORED]
    failed = False
    for function in environment.reward_functions:
        name = reward_name(function)
        for rollout in rollouts:
            rollout.rewards[name] = None
        if not scored:
            continue
        try:
            values = await _rewards(function, name, scored, environment.timeout_s)
        except RewardError as error:
            if environment.on_error == "stop":
                raise
            logger.warning("%s", error)
            failed = True
            continue
        for rollout, value in zip(scored, values, strict=True):
            rollout.rewards[name] = value
    weights = weights_at(environment, rollouts[0].step)
    for rollout in scored:
        if failed:
            rollout.counts[REWARD_ERRORS] += 1
        # A total without the failed function would rank the siblings by the other functions alone.
        rollout.reward = None if failed else total_reward(rollout.rewards, weights)


async def _rewards(
    function: RewardFunction, name: str, rollouts: list[Rollout], timeout_s: float
) -> list[float | None]:
    where = f"on item {rollouts[0].item_index}, {_shortened(rollouts[0].item)}"
    try:
        values = await call_bounded(function, rollouts, timeout_s)
    except TimeoutError as error:
        raise RewardError(f"the reward function {name!r} took longer than {timeout_s} s {where}") from error
    except Exception as error:  # whatever a reward function raises is passed on with its item
        raise RewardError(f"the reward function {name!r} raised {type(error).__name__}: {error} {where}") from error
    if not isinstance(values, list) or len(values) != len(rollouts):
        got = f"a list of {len(values)}" if isinstance(values, list) else f"a {type(values).__name__}"
        raise RewardError(
            f"the reward function {name!r} returned {got} for {len(rollouts)} rollouts {where}: "
            "it must return a list with one number for each"
        )
    for value in values:
        if value is not None and not _is_finite_number(value):
            raise RewardError(
                f"the reward function {name!r} returned {value!r} {where}: rewards are finite numbers, or None for a rollout "
                "that it does not score"
            )
    return [None if value is None else float(value) for value in values]


def _is_finite_number(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _shortened(item: Any, limit: int = 200) -> str:
    text = json.dumps(dict(item), default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[:limit] + "…"
