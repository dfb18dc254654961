"""A reward function for mathematical answers, compared by math-verify in worker processes."""

import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

from fuchsia_pl.envs.limited import QUEUE_TIMEOUT_S, LimitedWorkers, WorkerFailure
from fuchsia_pl.envs.rewards.matches import Extract, gold_problem, gold_text, last_turn, plain_answer
from fuchsia_pl.envs.rewards.numbers import Amount, read_number, same_number
from fuchsia_pl.envs.rewards.wrappers import has_box, last_boxed, last_sentences
from fuchsia_pl.types import ConfigError, Item, Rollout

WORKER = "fuchsia_pl.envs.rewards.math_worker.open_math_verify"
MATH_TIMEOUT = "math_timeout"
MATH_TOO_LONG = "math_too_long"
PERCENT = "%"


class MathAnswer:
    r"""1.0 if an answer is mathematically equal to the item's gold answer: `\frac{1}{2}` equals `0.5`.

    math-verify parses and compares with sympy. Answers such as `9^{9^{9^9}}` or ten thousand brackets take it minutes, and its
    own time limit uses signals, which only work in a main thread. So each comparison runs in a process of its own with limits of
    time and memory, which is killed at a limit. The answer then scores 0 and is counted as `math_timeout`.

    The answer is in the last turn, without its thinking: the last `\boxed{…}`, which must be complete; without a box, the
    expression that math-verify finds in the last sentences. Two plain numbers in a form that `read_number` supports (`1 1/2`,
    `\$32,\!348`, `1e-07`) are compared exactly and without math-verify, which reads some of these forms differently. `10\%`,
    `10` and `0.1` are equal to a gold `10\%`.

    Args:
        field: Field of the item with the gold answer, in LaTeX or as an expression.
        extract: Extracts the part of the last turn with the answer; returns None if there is none. None: the whole turn.
        timeout_s: Limit of one comparison in CPU seconds.
        num_workers: Number of concurrent comparisons. None: one per core, at most four.
        max_chars: Maximum length of an answer. A longer one is not compared: it scores 0 and is counted as `math_too_long`.
            Text before the box, or before the last sentences that fit, is not part of the answer and may have any length.
        name: Name of the reward in logs.

    Raises:
        ConfigError: A setting is not above 0.
    """

    counters = (MATH_TIMEOUT, MATH_TOO_LONG)
    min_timeout_s = QUEUE_TIMEOUT_S

    def __init__(
        self,
        field: str = "answer",
        extract: Extract | None = None,
        timeout_s: float = 2.0,
        num_workers: int | None = None,
        max_chars: int = 2000,
        name: str = "correct",
    ) -> None:
        size = num_workers if num_workers is not None else min(os.cpu_count() or 1, 4)
        for bound, value in {"timeout_s": timeout_s, "num_workers": size, "max_chars": max_chars}.items():
            if value <= 0:
                raise ConfigError(f"MathAnswer requires {bound} above 0, got {value}")
        self.__name__ = name
        self.field = field
        self.extract = extract
        self.timeout_s = timeout_s
        self.max_chars = max_chars
        self._accepted: set[str] = set()  # gold answers that passed the check; many items share one
        self._workers = LimitedWorkers(WORKER, size, opening={})

    def __call__(self, rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
        """Scores some rollouts."""
        with ThreadPoolExecutor(max_workers=self._workers.num_workers) as threads:
            return list(threads.map(self._score, rollouts))

    def close(self) -> None:
        """Ends the processes. The next comparison starts them again."""
        self._workers.close()

    def check_gold(self, item: Item) -> str | None:
        """Describes the fault of an item's gold answer; None if an answer that repeats it would score 1.0."""
        problem = gold_problem(lambda: gold_text(item, self.field))
        if problem is not None:
            return problem
        gold = gold_text(item, self.field)
        if gold in self._accepted or read_number(gold) is not None:
            return None
        try:
            equal = self._compare(gold, _in_box(gold))
        except ValueError as error:
            return str(error)
        if equal is None:
            return f"math-verify does not read the gold answer {gold[:80]!r} within {self.timeout_s:g} s"
        if not equal:
            return f"math-verify does not find the gold answer {gold[:80]!r} equal to itself"
        self._accepted.add(gold)
        return None

    def answer(self, rollout: Rollout) -> str | None:
        """The answer for a vote: the content of the last box, or else the extracted part; None without both."""
        part, boxed = self._part(rollout)
        answer = last_boxed(part) if boxed else part if self.extract is not None else ""
        return plain_answer(answer or "")

    def _part(self, rollout: Rollout) -> tuple[str, bool]:
        """The part of the last turn with the answer, and whether it has a box."""
        turn = last_turn(rollout)
        part = turn if self.extract is None else self.extract(turn) or ""
        return part, has_box(part)

    def _score(self, rollout: Rollout) -> float:
        part, boxed = self._part(rollout)
        answer = last_boxed(part) if boxed else last_sentences(part, self.max_chars)
        if not answer:  # no answer, or an incomplete box
            return 0.0
        if len(answer) > self.max_chars:
            rollout.counts[MATH_TOO_LONG] += 1
            return 0.0
        gold = gold_text(rollout.item, self.field)
        equal = _equal_numbers(answer, gold)
        if equal is None:
            equal = self._compare(_for_math_verify(gold), _in_box(answer) if boxed else answer)
        if equal is None:
            rollout.counts[MATH_TIMEOUT] += 1
        return float(bool(equal))

    def _compare(self, gold: str, answer: str) -> bool | None:
        """Whether two answers are equal; None if the comparison exceeds a limit.

        Raises:
            ValueError: math-verify cannot read the gold answer.
        """
        try:
            said = self._workers.call({"gold": gold, "answer": answer}, self.timeout_s)
        except WorkerFailure:
            return None
        if "gold_error" in said:
            raise ValueError(f"math-verify cannot read the gold answer {gold!r}: {said['gold_error']}")
        return bool(said["equal"])


def _in_box(text: str) -> str:
    return f"\\boxed{{{text}}}"


def _equal_numbers(answer: str, gold: str) -> bool | None:
    """Whether two plain numbers are equal; None if one is not a plain number, so that math-verify must compare.

    >>> _equal_numbers("0.1", "10%"), _equal_numbers("10", "10%"), _equal_numbers("$10", "10%"), _equal_numbers("x", "10%")
    (True, True, False, None)
    """
    expected, got = read_number(gold), read_number(answer)
    if expected is None or got is None:
        return None
    if same_number(answer, expected, "lenient"):
        return True
    return {expected.unit, got.unit} == {"", PERCENT} and _share(expected) == _share(got)


def _share(amount: Amount) -> Fraction:
    """The value of a number, of a percentage as a fraction: 10 % is 0.1."""
    return amount.value / 100 if amount.unit == PERCENT else amount.value


def _for_math_verify(gold: str) -> str:
    r"""A gold answer in a form that math-verify reads correctly: of `1 1/2` it would read only the 1.

    >>> [_for_math_verify(gold) for gold in ("1 1/2", "10%", r"1 000\%", "1 1/2 percent", "x + 1")]
    ['3/2', '10\\%', '1000\\%', '3/200', 'x + 1']
    """
    amount = read_number(gold)
    if amount is None:
        return gold
    # With the sign, it accepts 10 and 0.1 for 10 %. It divides by everything after a slash: 3/2 % would be 150.
    is_whole_percentage = amount.unit == PERCENT and amount.value.denominator == 1
    return rf"{amount.value}\%" if is_whole_percentage else str(_share(amount))
