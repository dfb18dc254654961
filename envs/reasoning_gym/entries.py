"""Addresses entries of reasoning-gym's datasets and has worker processes make and score them."""

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from fuchsia_pl.envs import ConfigError, Item
from fuchsia_pl.envs.base import is_finite_number
from fuchsia_pl.envs.limited import LimitedWorkers, WorkerDied, WorkerFailure

Split = Literal["train", "validation", "example"]
FIRST_INDEX: dict[Split, int] = {"train": 0, "validation": 2**30, "example": 2**31}
WORKER = "fuchsia_pl.library.reasoning_gym.worker.open_library"
INSTALL = "pip install 'fuchsia-pl[worlds]'"
# Training entries have seeds below 2**30, held-out ones below 2**31, worked examples the rest: no entry is in two splits.
MAX_ITEMS = 2**20  # of a split
NUM_SEEDS = FIRST_INDEX["validation"] // MAX_ITEMS
LEVEL = "level"  # in items of tasks with levels
CHUNK = 50  # entries of one call
MAKE_TIMEOUT_S = 120.0
MAX_WORKERS = 4


@dataclass(frozen=True)
class Task:
    """A dataset of reasoning-gym.

    Attributes:
        name: Its name in reasoning-gym, such as "chain_sum".
        weight: Its share of the items is this weight divided by the sum of all weights.
        config: Settings of the dataset, without `seed` and `size`.
        levels: How many of reasoning-gym's levels of the dataset are used, the easiest first; entry i has level i modulo this
            number. None: `config` alone, without levels.
    """

    name: str
    weight: float = 1.0
    config: dict[str, Any] = field(default_factory=dict)
    levels: int | None = None

    def level_of(self, index: int) -> int | None:
        """The level of an entry, None without levels.

        >>> Task("chain_sum", levels=3).level_of(2**30 + 4), Task("chain_sum").level_of(1)
        (2, None)
        """
        return None if self.levels is None else index % self.levels


class QuestionChanged(RuntimeError):
    """An entry that is made again has another question: the dataset does not repeat."""


class Entries:
    """Makes and scores entries in worker processes. reasoning-gym is loaded there and not in this process.

    Args:
        tasks: The datasets.
        seed: Another seed gives other entries.
        score_timeout_s: CPU seconds for the score of one answer.
        allow_unsound: Whether entries whose own answer does not score 1 are items.

    Raises:
        ConfigError: A setting is out of range, or a task is listed twice.
    """

    def __init__(self, tasks: Sequence[Task], seed: int, score_timeout_s: float, allow_unsound: bool = False) -> None:
        _check_settings(tasks, seed, score_timeout_s)
        self.tasks = {task.name: task for task in tasks}
        self.seed = seed
        self.score_timeout_s = score_timeout_s
        self.allow_unsound = allow_unsound
        self.workers = LimitedWorkers(WORKER, min(os.cpu_count() or 1, MAX_WORKERS), opening={})

    def make(self, split: Split, num_items: int) -> list[Item]:
        """The items of a split, those of the tasks mixed evenly, so that the first ones have the same shares.

        Raises:
            ConfigError: A task's name or config is not one of reasoning-gym, its weight gives it no item, it does not make its
                entries, or its own answers do not score 1.
        """
        numbers = shares({name: task.weight for name, task in self.tasks.items()}, num_items)
        none = [name for name, number in numbers.items() if not number]
        if none:
            raise ConfigError(f"ReasoningGym: the weights of {none} give them none of {num_items} {split} items")
        self.check_tasks()
        chunks = [
            (name, range(FIRST_INDEX[split] + start, FIRST_INDEX[split] + min(start + CHUNK, number)))
            for name, number in numbers.items()
            for start in range(0, number, CHUNK)
        ]
        with ThreadPoolExecutor(self.workers.num_workers) as threads:
            made = [item for part in threads.map(lambda chunk: self._chunk(*chunk), chunks) for item in part]
        return sorted(
            made, key=lambda item: ((item["index"] - FIRST_INDEX[split] + 0.5) / numbers[item["task"]], item["task"])
        )

    def examples(self, number: int) -> dict[str, list[Item]]:
        """Entries of each task that no split has.

        Args:
            number: How many of each task.

        Raises:
            ConfigError: As for `make`, or a task stores no answer, as some do that accept any solution.
        """
        self.check_tasks()
        first = FIRST_INDEX["example"]
        made = {name: self._chunk(name, range(first, first + number)) for name in self.tasks}
        without = [name for name, items in made.items() if any(not isinstance(item["answer"], str) for item in items)]
        if without:
            raise ConfigError(
                f"ReasoningGym: {without} store no answers to show: leave these tasks out, or set num_examples: 0"
            )
        return made

    def score(self, item: Item, answer: str) -> float:
        """The score of an answer.

        Raises:
            WorkerFailure: The dataset raised an exception, took too long, or returned no finite number.
            QuestionChanged: The entry that is made again has another question.
        """
        said = self._ask_score(item, answer)
        if said.get("same") is not True:
            # A dataset that evaluates the answer may reply anything, so the question is compared again without the answer.
            if self._ask_score(item, None).get("same") is True:
                raise WorkerDied("its reply depends on the answer where it must not")
            raise QuestionChanged(
                f"reasoning-gym made another question for entry {item['index']} of {item['task']!r} than at the start of the "
                "run: this dataset does not repeat, leave it out"
            )
        score = said.get("score")
        if score is None or not is_finite_number(score):
            raise WorkerDied(f"its score is {score!r:.80}, which is no finite number")
        return float(score)

    def _ask_score(self, item: Item, answer: str | None) -> dict[str, Any]:
        index, level = item["index"], self.tasks[item["task"]].level_of(item["index"])
        request = {"seed": seed_of(self.seed, index), "level": level, "question": item["question"], "answer": answer}
        said = self._ask("score", item["task"], request, self.score_timeout_s)
        if not isinstance(said, dict):
            raise WorkerDied(f"its reply {said!r:.80} is no score")
        return said

    def all_names(self) -> list[str]:
        """The names of all datasets of reasoning-gym."""
        return list(self.workers.call({"do": "names"}, MAKE_TIMEOUT_S))

    def check_tasks(self) -> None:
        """Checks the names and settings of the tasks.

        Raises:
            ConfigError: One is not one of reasoning-gym.
        """
        for name in self.tasks:
            try:
                problem = self._ask("check", name, {}, MAKE_TIMEOUT_S)
            except WorkerFailure as error:
                raise ConfigError(f"ReasoningGym: the check of task {name!r} failed: {error}") from error
            if problem is not None:
                raise ConfigError(f"ReasoningGym: task {name!r}: {problem}")

    def _chunk(self, name: str, indices: range) -> list[Item]:
        level_of = self.tasks[name].level_of
        request = {"entries": [[seed_of(self.seed, index), level_of(index)] for index in indices]}
        try:
            made = self._ask("make", name, request, MAKE_TIMEOUT_S)
        except WorkerFailure as error:
            raise ConfigError(
                f"ReasoningGym: task {name!r} does not make its entries {indices[0]} to {indices[-1]}: {error}"
            ) from error
        items: list[Item] = []
        for index, (question, answer, score) in zip(indices, made, strict=True):
            if not self.allow_unsound and (score is None or score < 1.0):
                raise ConfigError(
                    f"ReasoningGym: task {name!r} gives the answer of its own entry {index} the score {score}, which must "
                    "be 1: leave the task out, or set `allow_unsound: true` of the environment"
                )
            level = {} if level_of(index) is None else {LEVEL: level_of(index)}
            items.append({"task": name, "index": index, **level, "question": question, "answer": answer})
        return items

    def _ask(self, do: str, name: str, request: dict[str, Any], timeout_s: float) -> Any:
        task = self.tasks[name]
        settings = {"task": name, "config": task.config, "levels": task.levels}
        return self.workers.call({"do": do, **settings, **request}, timeout_s)


def seed_of(seed: int, index: int) -> int:
    """The seed of the dataset whose first entry is the entry of this index, given the seed of the environment.

    >>> seed_of(0, 7), seed_of(1, 7), seed_of(0, 2**30 + 7) - 2**30
    (7, 1048583, 7)
    """
    return seed * MAX_ITEMS + index


def shares(weights: dict[str, float], number: int) -> dict[str, int]:
    """Divides a number by weights. What is left after rounding down goes to the largest remainders, one each.

    >>> shares({"a": 2.0, "b": 1.0, "c": 1.0}, 10)
    {'a': 5, 'b': 3, 'c': 2}
    """
    total = sum(weights.values())
    exact = {name: number * weight / total for name, weight in weights.items()}
    found = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: found[name] - exact[name])
    for name in by_remainder[: number - sum(found.values())]:
        found[name] += 1
    return found


def _check_settings(tasks: Sequence[Task], seed: int, score_timeout_s: float) -> None:
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ConfigError(f"ReasoningGym requires one task or more, each name once, got {names}")
    for task in tasks:
        if not 0 < task.weight < math.inf:
            raise ConfigError(f"ReasoningGym: the weight of task {task.name!r} must be above 0, got {task.weight}")
        if task.levels is not None and task.levels < 1:
            raise ConfigError(
                f"ReasoningGym: the levels of task {task.name!r} must be 1 or more, or null, got {task.levels}"
            )
        own = sorted({"seed", "size"} & set(task.config))
        if own:
            raise ConfigError(
                f"ReasoningGym: the config of task {task.name!r} sets {own}, with which the environment addresses entries: leave "
                "them out, and set `seed` of the environment"
            )
        try:
            json.dumps(task.config)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"ReasoningGym: the config of task {task.name!r} must be like JSON: {error}") from error
    if not 0 <= seed < NUM_SEEDS:
        raise ConfigError(f"ReasoningGym requires a seed from 0 to {NUM_SEEDS - 1}, got {seed}")
    if score_timeout_s <= 0:
        raise ConfigError(f"ReasoningGym requires score_timeout_s above 0, got {score_timeout_s}")
