"""The audit of a whole environment, which a limited process makes from its class path and its arguments."""

import asyncio
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from fuchsia_pl.envs.audit.task import ANSWER, PLAIN_FORMS, AuditTask
from fuchsia_pl.envs.base import Environment, reward_name, total_reward, weights_at
from fuchsia_pl.envs.tool_environment import ToolEnvironment
from fuchsia_pl.types import Completion, ConfigError, Item, Rollout, RolloutStatus, Turn

FUNCTION = f"{__name__}.answer_request"
# Reward functions that read ids find one for each turn.
SAMPLED = Completion((1,), (-1.0,), "stop", None, 0)


def environment_task(environment: Environment, class_path: str, arguments: Mapping[str, Any]) -> AuditTask:
    """The task of auditing an environment as a whole.

    Args:
        environment: The environment.
        class_path: Its class path.
        arguments: The arguments of its constructor.

    Raises:
        ConfigError: The environment needs tool servers, or an argument is no plain value.
    """
    kind = type(environment).__name__
    if isinstance(environment, ToolEnvironment):
        raise ConfigError(f"{kind} has tools, and an audit starts no tool servers: run check-env without --all-tasks")
    try:
        json.dumps(arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kind} cannot be made in another process: an argument is no plain value: {error}") from error
    return AuditTask(kind, FUNCTION, {"class_path": class_path, "arguments": dict(arguments)})


def answer_request(request: dict[str, Any]) -> Any:
    """The function of the task, see `AuditTask`. It runs in a limited process."""
    argument = request["argument"]
    environment = _environment(argument["class_path"], json.dumps(argument["arguments"]))
    if request["do"] == "score":
        return asyncio.run(_score(environment, request["item"], request["turns"]))
    items = environment.train_items() if request["split"] == "train" else environment.validation_items()
    first = [items[index] for index in range(min(request["num"], len(items)))]
    if request["do"] == "questions":
        return [_question(environment, item) for item in first]
    return [_sampled(environment, index, item) for index, item in enumerate(first)]


@lru_cache(maxsize=1)
def _environment(class_path: str, arguments: str) -> Environment:
    module, _, name = class_path.rpartition(".")
    environment: Environment = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    return environment


def _question(environment: Environment, item: Item) -> str:
    return "\n\n".join(str(message["content"]) for message in environment.messages(item))


def _sampled(environment: Environment, index: int, item: Item) -> dict[str, Any]:
    """An item by its position. Its gold answer is what the environment reads from the gold turns."""
    found: dict[str, Any] = {"item": index, "question": _question(environment, item), "gold": None}
    turns = environment.gold_turns(item)
    if not turns:
        return found
    rollout = asyncio.run(_played(environment, index, item, turns))
    answer = environment.answer(rollout) or ""
    head, place, tail = turns[-1].rpartition(answer) if answer else ("", "", "")
    form, gold = (f"{head}{ANSWER}{tail}", answer) if place else (ANSWER, turns[-1])
    return {**found, "gold": gold, "forms": list(dict.fromkeys([form, ANSWER])), "before": turns[:-1]}
