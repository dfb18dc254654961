"""Tasks for tests of the audit, most of them with a fault. Limited processes load this file, so it imports no torch."""

import asyncio
import math
import os
import random
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from fuchsia_pl.envs import MultiTurnEnvironment, SingleTurnEnvironment
from fuchsia_pl.envs.audit.task import ANSWER, score_each
from fuchsia_pl.envs.rewards import last_answer, last_turn

FORM = f"<answer>{ANSWER}</answer>"
ITEMS = {"train": range(11, 1000), "validation": range(1011, 1100)}


def question(number: int) -> str:
    return f"What is {number} plus 1000?"


def gold(number: int) -> str:
    return str(number + 1000)


def number_of(answer: str) -> float | None:
    try:
        return float(answer)
    except ValueError:
        return None


def sound(answer: str, right: str) -> float:
    return float(answer.strip() == right)


def sound_with_credit(answer: str, right: str) -> float:
    return 1.0 if number_of(answer) == float(right) else 0.05


def pays_any_text(answer: str, right: str) -> float:
    return float(bool(answer) == bool(right))


def pays_nan(answer: str, right: str) -> float:
    number = number_of(answer)
    return 0.0 if number is None else min(1.0, math.exp(-abs(number - float(right))))


def pays_zero(answer: str, right: str) -> float:
    number = number_of(answer)
    return float(number is not None and float(right) % (number or 1) == 0 and number < 1)


def pays_empty(answer: str, right: str) -> float:
    return 0.3 if not answer else sound(answer, right)


def pays_half(answer: str, right: str) -> float:
    return float(len(answer) > 1 and right.startswith(answer))


def evaluates(answer: str, right: str) -> float:
    try:
        return float("**" not in answer and eval(answer) == int(right))  # a tower of powers takes minutes
    except Exception:
        return 0.0


def evaluates_words(answer: str, right: str) -> float:
    for word in answer.strip("[]").split()[:100]:
        try:
            if "**" not in word and eval(word.rpartition("=")[2]) == int(right):
                return 1.0
        except Exception:
            continue
    return 0.0


def raises(answer: str, right: str) -> float:
    return float(Fraction(answer.partition("e")[0] or "0") == int(right)) if len(answer) < 100 else 0.0


def exits(answer: str, right: str) -> float:
    if answer == "None":
        raise SystemExit(0)
    return sound(answer, right)


def hangs(answer: str, right: str) -> float:
    while "e1" in answer:
        pass
    return sound(answer, right)


def dies(answer: str, right: str) -> float:
    if len(answer) > 100_000:
        os._exit(0)
    return sound(answer, right)


def takes_memory(answer: str, right: str) -> float:
    return sound(answer, right) if len(answer) < 100_000 else float(len(bytearray(2**40)))


def never_pays_gold(answer: str, right: str) -> float:
    return float(answer == right + " apples")


def not_a_number(answer: str, right: str) -> float:
    return math.nan if answer == "x" else sound(answer, right)


def other_each_time(answer: str, right: str) -> float:
    return sound(answer, right) or 0.05 * random.random()


def other_hash(answer: str, right: str) -> float:
    return sound(answer, right) or 0.1 * (hash(answer) % 2)


def pays_few_golds(answer: str, right: str) -> float:
    return sound(answer, right) if right != "1030" else 0.5 * sound(answer, right)


SCORES = {
    score.__name__: score
    for score in (
        *(sound, sound_with_credit, pays_any_text, pays_nan, pays_zero, pays_empty, pays_half),
        *(evaluates, evaluates_words, raises, exits, hangs, dies, takes_memory),
        *(never_pays_gold, pays_few_golds, not_a_number, other_each_time, other_hash),
    )
}


def answered(turns: list[str]) -> str:
    return turns[-1].partition("<answer>")[2].partition("</answer>")[0] if "</answer>" in turns[-1] else ""


def scored_as(name: str, right: str) -> Callable[[list[str]], tuple[float, bool]]:
    def scored(turns: list[str]) -> tuple[float, bool]:
        reward = SCORES.get(name, sound)(answered(turns), right)
        return reward, reward >= 1.0

    return scored


def surveyed(name: str, number: int) -> Any:
    return score_each(scored_as(name, gold(number)), [[FORM.replace(ANSWER, gold(number))]])[0]


def answer_request(request: dict[str, Any]) -> Any:
    """The function of all tasks here; the argument is the name of a score, or of a fault of the items."""
    argument = request["argument"]
    if argument == "cannot_be_made":
        raise ValueError("no such task")
    if request["do"] == "score":
        return score_each(scored_as(argument, gold(request["item"])), request["answers"])
    numbers = list(ITEMS["train" if argument == "repeats" else request["split"]][: request["num"]])
    if argument == "other_items":
        numbers = [number + random.randrange(100) for number in numbers]
    if request["do"] == "survey":
        return [[question(n), surveyed(argument, n)] for n in numbers]
    return [{"item": n, "question": question(n), "gold": gold(n), "forms": [FORM]} for n in numbers]


def generated(request: dict[str, Any]) -> Any:
    """A sound task whose reward depends on settings: its credit for the form, its tolerance, and its scale."""
    settings = request["argument"]
    if request["do"] != "score":
        return answer_request({**request, "argument": "sound"})
    right = gold(request["item"])

    def scored(turns: list[str]) -> tuple[float, bool]:
        answer = answered(turns)
        number = number_of(answer) if settings["reads_numbers"] else None
        is_right = answer == right or number == float(right)
        near = number is not None and abs(number - float(right)) < settings["tolerance"]
        credit = settings["credit"] if answer else 0.0
        return settings["scale"] * (1.0 if is_right else settings["near"] if near else credit), is_right

    return score_each(scored, request["answers"])


def asleep(request: dict[str, Any]) -> Any:
    """A task whose items are never made."""
    while True:
        time.sleep(1.0)


class Sums(SingleTurnEnvironment):
    """A whole environment, which is sound."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.first = first
        self.reward_functions = [self.correct]

    def train_items(self):
        return [{"prompt": question(n), "sum": gold(n)} for n in ITEMS["train"]]

    def validation_items(self):
        return [{"prompt": question(n), "sum": gold(n)} for n in ITEMS["validation"]]

    def gold_turns(self, item):
        return [f"<think>easy</think>It is <answer>{item['sum']}</answer>."]

    def correct(self, rollouts, *args, **kwargs):
        return [float(last_answer(last_turn(r)) == r.item["sum"]) for r in rollouts]


class LoopedSums(Sums):
    """Its reward is a sync function that runs an event loop, as one around an async client does."""

    def correct(self, rollouts, *args, **kwargs):
        async def compare():
            return super(LoopedSums, self).correct(rollouts)

        return asyncio.run(compare())


class EvaluatedSums(Sums):
    """Its reward evaluates the answer, and its splits share items."""

    def validation_items(self):
        return self.train_items()[:50]

    def correct(self, rollouts, *args, **kwargs):
        return [evaluates(last_answer(last_turn(r)) or "0", r.item["sum"]) for r in rollouts]


class GuessedSums(MultiTurnEnvironment):
    """Two turns, async methods and no gold answers: whoever answers "0" in the second turn is paid."""

    def __init__(self) -> None:
        super().__init__()
        self.max_steps = 2
        self.reward_functions = [self.correct]

    train_items, validation_items = Sums.train_items, Sums.validation_items

    async def step_rollout(self, rollout):
        if len(rollout.turns) == 2:
            rollout.finish()
        else:
            rollout.respond("Are you sure?")

    async def correct(self, rollouts, *args, **kwargs):
        return [float(r.status == "completed" and r.turns[1].text == "0") for r in rollouts]


class OnlyHere(Sums):
    """Its constructor fails in another process."""

    def __init__(self) -> None:
        super().__init__()
        if "pytest" not in sys.modules:
            raise FileNotFoundError("there is no such file")
