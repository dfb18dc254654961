"""Runs an environment's reward functions over a group of siblings."""

import json
import logging
import reprlib
from collections.abc import Mapping
from typing import Any

from fuchsia_pl.envs.base import (
    MIN_TIMEOUT_S,
    NONE_UNSCORES,
    Environment,
    RewardFunction,
    is_finite_number,
    reward_name,
    total_reward,
    weights_at,
)
from fuchsia_pl.envs.bounded import ENDS_RUN, call_bounded
from fuchsia_pl.envs.user_code import reason
from fuchsia_pl.types import Rollout, RolloutStatus

# Counter for `on_error` "unscored". The environment need not declare it.
REWARD_ERRORS = "reward_errors"
# Ends that do not depend on the policy.
UNSCORED = (RolloutStatus.TOOL_ERROR, RolloutStatus.ENV_ERROR)
# A rollout's score by one function: its value, one number per turn, or None if the function does not score it.
Score = float | list[float] | None

LARGEST = (
    3.4e38  # advantages are float32, and a float64's squares, from which the spread is computed, would be infinite
)

logger = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """A reward function raised, timed out, or returned an invalid value."""


async def score_group(environment: Environment, rollouts: list[Rollout]) -> None:
    """Fills `rewards`, `turn_rewards`, `weighted_turn_rewards` and `reward` of the siblings of one item.

    Rollouts whose end does not depend on the policy are not passed to the reward functions and stay unscored.

    Raises:
        RewardError: A reward function failed. The message names the function and the item; the cause is chained. If the
            environment's `on_error` is "unscored", all siblings stay unscored and are counted instead.
    """
    scored = [rollout for rollout in rollouts if rollout.status not in UNSCORED]
    names = [reward_name(function) for function in environment.reward_functions]
    for rollout in rollouts:
        rollout.rewards.update(dict.fromkeys(names))
    if not scored:
        return
    weights = weights_at(environment, rollouts[0].step)
    errors: list[RewardError] = []
    unread: set[int] = set()  # positions of those whose total would lack a part that may be negative
    for function, name in zip(environment.reward_functions, names, strict=True):
        try:
            scores = await _scores(function, name, scored, _timeout_s(environment, function))
        except RewardError as error:
            errors.append(_passed(environment, error))
            continue
        for position, (rollout, score) in enumerate(zip(scored, scores, strict=True)):
            if isinstance(score, list):
                rollout.turn_rewards[name] = score
            rollout.rewards[name] = float(sum(score)) if isinstance(score, list) else score
            if score is None and weights[name] != 0.0 and _none_unscores(function):
                unread.add(position)
    for position, rollout in enumerate(scored):
        # Without the failed function, the total would rank the siblings by the other functions alone.
        is_whole = not errors and position not in unread
        rollout.reward = total_reward(rollout.rewards, weights) if is_whole else None
        rollout.weighted_turn_rewards = _weighted(rollout, weights)
        if rollout.reward is not None and not _fits(rollout, weights):
            errors.append(_passed(environment, RewardError(_endless(rollout, weights))))
    if errors:
        for rollout in scored:
            rollout.reward = None
            rollout.counts[REWARD_ERRORS] += 1


def _timeout_s(environment: Environment, function: RewardFunction) -> float:
    """Time limit of a call: the environment's, unless the function has limits of its own that may take longer."""
    own = getattr(function, MIN_TIMEOUT_S) if hasattr(function, MIN_TIMEOUT_S) else 0.0
    return max(environment.timeout_s, own)


def _none_unscores(function: RewardFunction) -> bool:
    return hasattr(function, NONE_UNSCORES) and bool(getattr(function, NONE_UNSCORES))


def _passed(environment: Environment, error: RewardError) -> RewardError:
    """Raises the error if `on_error` is "stop", else logs and returns it."""
    if environment.on_error == "stop":
        raise error
    logger.warning("%s", error)
    return error


def _weighted(rollout: Rollout, weights: Mapping[str, float]) -> list[float]:
    """Weighted sum of the rewards of each turn; empty if no function scored turns."""
    weighted = [[weights[name] * value for value in values] for name, values in rollout.turn_rewards.items()]
    return [float(sum(of_turn)) for of_turn in zip(*weighted, strict=True)]


async def _scores(function: RewardFunction, name: str, rollouts: list[Rollout], timeout_s: float) -> list[Score]:
    try:
        # A copy: a function that changes the list must not change the assignment of rewards.
        values = await call_bounded(function, list(rollouts), timeout_s)
    except TimeoutError as error:
        raise RewardError(
            f"the reward function {name!r} took longer than {timeout_s} s {_where(rollouts[0])}"
        ) from error
    except ENDS_RUN:
        raise
    except Exception as error:  # user code may raise anything
        raise RewardError(f"the reward function {name!r} raised {reason(error)} {_where(rollouts[0])}") from error
    if not isinstance(values, list) or len(values) != len(rollouts):
        got = f"a list of {len(values)}" if isinstance(values, list) else f"a {type(values).__name__}"
        raise RewardError(
            f"the reward function {name!r} returned {got} for {len(rollouts)} rollouts {_where(rollouts[0])}: "
            "it must return a list with one number for each"
        )
    scores_turns = any(isinstance(value, list) for value in values)
    for rollout, value in zip(rollouts, values, strict=True):
        if value is None:
            continue
        fault = _fault_of_turns(value, rollout) if scores_turns else None
        if fault is not None:
            raise RewardError(f"the reward function {name!r} returned {fault}")
        for number in value if scores_turns else [value]:
            if not is_finite_number(number):
                raise RewardError(
                    f"the reward function {name!r} returned {_shown(number)} {_where(rollouts[0])}: rewards are finite numbers, "
                    "or None for a rollout that it does not score"
                )
    return [_as_floats(value) for value in values]


def _fault_of_turns(value: Any, rollout: Rollout) -> str | None:
    """What is wrong with the form of a rollout's score by a function that scores turns."""
    if not isinstance(value, list):
        return (
            f"{_shown(value)} for sibling {rollout.sibling} and lists for others {_where(rollout)}: it must return a number for "
            "each rollout, or for each a list with a number per turn"
        )
    if len(value) != len(rollout.all_turns):
        return (
            f"a list of {len(value)} for sibling {rollout.sibling}, which has {len(rollout.all_turns)} turns, {_where(rollout)}: "
            "it must have one number per turn of the policy"
        )
    return None


def _as_floats(value: Any) -> Score:
    """A checked score with floats in place of other numbers."""
    if isinstance(value, list):
        return [float(number) for number in value]
    return None if value is None else float(value)


def _fits(rollout: Rollout, weights: Mapping[str, float]) -> bool:
    """Whether the total and its parts fit into a batch's float32."""
    assert rollout.reward is not None
    parts = [weights[name] * value for name, value in rollout.rewards.items() if value is not None]
    # Numbers of turns that are too large may have a small sum.
    turns = [weights[name] * value for name, values in rollout.turn_rewards.items() for value in values]
    return all(abs(number) <= LARGEST for number in (rollout.reward, *parts, *turns))


def _endless(rollout: Rollout, weights: Mapping[str, float]) -> str:
    parts = [
        f"{name} {value:g}{_turns_shown(rollout, name)} x weight {weights[name]:g}"
        for name, value in rollout.rewards.items()
        if value is not None
    ]
    return (
        f"the total reward of sibling {rollout.sibling} is {rollout.reward:g} {_where(rollout)}: {' + '.join(parts)}. A total "
        f"and its parts must be finite and at most {LARGEST:g}: lower the rewards or their weights"
    )


def _turns_shown(rollout: Rollout, name: str) -> str:
    return f" (turns {_shown(rollout.turn_rewards[name])})" if name in rollout.turn_rewards else ""


def _where(rollout: Rollout) -> str:
    return f"on item {rollout.item_index}, {_shown(rollout.item)}"


def _shown(value: Any, limit: int = 200) -> str:
    """A value for an error message, as JSON if it is a mapping. A value without a text must not replace the error."""
    try:
        text = json.dumps(dict(value), default=str, ensure_ascii=False) if isinstance(value, Mapping) else repr(value)
    except Exception:  # JSON does not support some keys, and a `repr` of user code may raise anything
        text = reprlib.repr(value) if isinstance(value, Mapping) else f"a {type(value).__name__} without a text"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[:limit] + "…"
