"""The audit of a whole environment, which a limited process makes from its class path and its arguments."""

import asyncio
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from typing import Any

from fuchsia_pl.envs.audit.task import ANSWER, AuditTask, score_each
from fuchsia_pl.envs.base import Environment, reward_name, total_reward, weights_at
from fuchsia_pl.envs.bounded import call_bounded
from fuchsia_pl.envs.self_driven import SelfDrivenEnvironment
from fuchsia_pl.envs.thinking import without_thinking
from fuchsia_pl.envs.tool_environment import ToolEnvironment
from fuchsia_pl.types import Completion, ConfigError, Item, Rollout, RolloutStatus, Turn

NUM_SURVEYED, NUM_GOLDS = 2000, 24
OPEN = f"{__name__}.open_environment"
# Reward functions that read ids find one for each turn.
SAMPLED = Completion((1,), (-1.0,), "stop", None, 0)


def environment_task(environment: Environment, class_path: str, arguments: Mapping[str, Any]) -> AuditTask:
    """The task of auditing an environment as a whole.

    Args:
        environment: The environment.
        class_path: Its class path.
        arguments: The arguments of its constructor.

    Raises:
        ConfigError: The environment needs tool servers, consists of others or is an agent, or an argument is no plain value.
    """
    kind = type(environment).__name__
    if environment.mixed or isinstance(environment, SelfDrivenEnvironment):
        raise ConfigError(
            f"{kind} takes no answers of its own, which an audit plays: run `fuchsia check-env --all-tasks` with the environment "
            "of one part of a mixture; an agent's rewards cannot be audited"
        )
    if isinstance(environment, ToolEnvironment):
        raise ConfigError(
            f"{kind} has tools, and an audit starts no tool servers: run `fuchsia check-env` without --all-tasks, which plays "
            "texts with them"
        )
    try:
        opening = json.loads(json.dumps({"class_path": class_path, "arguments": dict(arguments)}))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{kind} cannot be audited, since it cannot be made in another process: an argument is no plain value ({error})"
        ) from error
    return AuditTask(kind, OPEN, opening=opening, num_surveyed=NUM_SURVEYED)


def open_environment(opening: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Makes the environment, and returns the function of the task, see `AuditTask`. It runs in a limited process."""
    module, _, name = opening["class_path"].rpartition(".")
    environment: Environment = getattr(importlib.import_module(module), name)(**opening["arguments"])

    def answer(request: Mapping[str, Any]) -> Any:
        if request["do"] == "score":
            return score_each(partial(_score, environment, "train", request["item"]), request["answers"])
        items = _items(environment, request["split"])
        first = [items[index] for index in range(min(request["num"], len(items)))]
        if request["do"] == "survey":
            golds = [_gold_score(environment, request["split"], index) for index in range(min(NUM_GOLDS, len(first)))]
            return [[_question(environment, item), score] for item, score in zip_longest(first, golds)]
        return [_sampled(environment, index, item) for index, item in enumerate(first)]

    for split in ("train", "validation"):  # before the first call, so that they are loaded once
        with suppress(Exception):  # raised again by the calls that need the split
            _items(environment, split)
    return answer


def _items(environment: Environment, split: str) -> Sequence[Item]:
    return environment.train_items() if split == "train" else environment.validation_items()


def _question(environment: Environment, item: Item) -> str:
    return "\n\n".join(str(message["content"]) for message in environment.messages(item))


def _sampled(environment: Environment, index: int, item: Item) -> dict[str, Any]:
    """An item by its position. Its gold answer is what the environment reads from the gold turns."""
    found = {"item": index, "question": _question(environment, item), "gold": None}
    turns = environment.gold_turns(item)
    if not turns:
        return found
    answer = environment.answer(asyncio.run(_played(environment, "train", index, turns))) or ""
    head, place, tail = turns[-1].rpartition(answer) if answer else ("", "", "")
    form, gold = (f"{head}{ANSWER}{tail}", answer) if place else (ANSWER, turns[-1])
    return {**found, "gold": gold, "forms": list(dict.fromkeys([form, ANSWER])), "before": turns[:-1]}


def _gold_score(environment: Environment, split: str, index: int) -> Any:
    turns = environment.gold_turns(_items(environment, split)[index])
    return score_each(partial(_score, environment, split, index), [turns])[0] if turns else None


def _score(environment: Environment, split: str, index: int, turns: list[str]) -> tuple[float | None, bool]:
    return asyncio.run(_scored(environment, split, index, turns))


async def _scored(environment: Environment, split: str, index: int, turns: list[str]) -> tuple[float | None, bool]:
    """The total reward of a rollout with some turns, with the final weights, and whether it is correct."""
    rollout = await _played(environment, split, index, turns)
    for function in environment.reward_functions:
        (value,) = await call_bounded(function, [rollout], environment.timeout_s)
        rollout.rewards[reward_name(function)] = sum(value) if isinstance(value, list) else value  # one per turn
    rollout.reward = total_reward(rollout.rewards, weights_at(environment, step=None))
    return rollout.reward, environment.is_correct(rollout)


async def _played(environment: Environment, split: str, index: int, turns: Sequence[str]) -> Rollout:
    """A finished rollout. The last turn is repeated until the environment ends the rollout, or its turns run out."""
    item = _items(environment, split)[index]
    messages = [dict(message) for message in environment.messages(item)]
    rollout = Rollout(item, index, 0, 1.0, _question(environment, item), messages=messages)
    await environment.open_rollout(rollout)
    for number in range(environment.max_steps):
        text = turns[min(number, len(turns) - 1)]
        answer = without_thinking(text, environment.thinking_marks)
        rollout.append(Turn(SAMPLED, text, text, answer, answer))
        await call_bounded(environment.step_rollout, rollout, environment.step_timeout_s)
        if rollout.status is not None:
            break
        rollout.take_responses(environment.max_response_chars)
    else:
        rollout.finish(RolloutStatus.TRUNCATED)
    await environment.close_rollout(rollout)
    return rollout
