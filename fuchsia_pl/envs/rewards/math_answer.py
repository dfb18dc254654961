"""Mathematical answers, compared by math-verify in worker processes."""

import json
import os
import queue
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

from fuchsia_pl.envs.rewards.matches import Extract, gold_problem, gold_text, last_turn
from fuchsia_pl.envs.rewards.numbers import Amount, read_number, same_number
from fuchsia_pl.envs.rewards.wrappers import has_box, last_boxed, last_sentences
from fuchsia_pl.types import ConfigError, Item, Rollout

WORKER = Path(__file__).with_name("math_worker.py")
START_TIMEOUT_S = 60.0
MATH_TIMEOUT = "math_timeout"
MATH_TOO_LONG = "math_too_long"
PERCENT = "%"


class MathAnswer:
    r"""1.0 where an answer equals the item's gold answer as mathematics: `\frac{1}{2}` and `0.5` are one answer.

    math-verify parses and compares with sympy, which an answer such as `9^{9^{9^9}}` or ten thousand brackets keeps busy for
    minutes, and stops itself by signals, which only work in a main thread. So it runs in processes of its own, each limited in
    memory and killed at the time limit; what was killed scores 0 and is counted as `math_timeout`.

    The answer is in the last turn, without its thinking: the last `\boxed{…}`, which must be complete; else what math-verify
    finds in the last sentences. Two plain numbers, as `read_number` reads them (`1 1/2`, `\$32,\!348`, `1e-07`), are compared
    exactly and without math-verify, which reads some of these otherwise. `10\%`, `10` and `0.1` are equal to a gold `10\%`.

    Args:
        field: The item's field with the gold answer, in LaTeX or as an expression.
        extract: Takes the part of the last turn that holds the answer, None where there is none. By default all of it.
        timeout_s: Bound of one comparison.
        num_workers: Processes, None for one per core up to four.
        max_chars: A longer answer is not compared: it scores 0 and is counted as `math_too_long`. What the policy wrote before
            its box, or before the last sentences that fit, is not the answer and may be of any length.
        name: The reward's name in logs.

    Raises:
        ConfigError: A bound is not above 0.
    """

    counters = (MATH_TIMEOUT, MATH_TOO_LONG)

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
                raise ConfigError(f"MathAnswer takes {bound} above 0, got {value}")
        self.__name__ = name
        self.field = field
        self.extract = extract
        self.timeout_s = timeout_s
        self.max_chars = max_chars
        self._accepted: set[str] = set()  # gold answers that were checked: many items of a set share one
        self._workers: queue.Queue[_Worker] = queue.Queue()
        for _ in range(size):
            self._workers.put(_Worker(timeout_s))

    def __call__(self, rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
        """The rewards of some rollouts."""
        with ThreadPoolExecutor(max_workers=self._workers.maxsize or len(rollouts)) as threads:
            return list(threads.map(self._score, rollouts))

    def close(self) -> None:
        """Ends the processes. They are started again when needed."""
        workers = [self._workers.get(timeout=START_TIMEOUT_S) for _ in range(self._workers.qsize())]
        for worker in workers:
            worker.kill()
            self._workers.put(worker)

    def check_gold(self, item: Item) -> str | None:
        """What is wrong with an item's gold answer, None where an answer that repeats it would be right."""
        problem = gold_problem(lambda: gold_text(item, self.field))
        if problem is not None:
            return problem
        gold = gold_text(item, self.field)
        if gold in self._accepted or read_number(gold) is not None:
            return None
        try:
            equal = self._compare(gold, _in_box(gold), tries=1)
        except ValueError as error:
            return str(error)
        if equal is None:
            return f"math-verify does not read the gold answer {gold[:80]!r} within {self.timeout_s:g} s"
        if not equal:
            return f"math-verify does not find the gold answer {gold[:80]!r} equal to itself"
        self._accepted.add(gold)
        return None

    def _score(self, rollout: Rollout) -> float:
        turn = last_turn(rollout)
        part = turn if self.extract is None else self.extract(turn)
        boxed = part is not None and has_box(part)
        answer = None if part is None else last_boxed(part) if boxed else last_sentences(part, self.max_chars)
        if not answer:  # nothing was written, or a box is not complete
            return 0.0
        if len(answer) > self.max_chars:
            rollout.counts[MATH_TOO_LONG] += 1
            return 0.0
        gold = gold_text(rollout.item, self.field)
        equal = _equal_numbers(answer, gold)
        if equal is None:
            equal = self._compare(_for_math_verify(gold), _in_box(answer) if boxed else answer, tries=2)
        if equal is None:
            rollout.counts[MATH_TIMEOUT] += 1
        return float(bool(equal))

    def _compare(self, gold: str, answer: str, tries: int) -> bool | None:
        worker = self._workers.get()
        try:
            return worker.compare(gold, answer)
        except ValueError:
            if tries == 1:
                raise
            # What an earlier answer left in the process's memory may keep it from reading even a gold that was checked.
            worker.kill()
            return worker.compare(gold, answer)
        finally:
            self._workers.put(worker)


def _in_box(text: str) -> str:
    return f"\\boxed{{{text}}}"


def _equal_numbers(answer: str, gold: str) -> bool | None:
    """Whether two plain numbers are equal, None where one is none and math-verify has to look at them.

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
    """What a number without a unit is, and a percentage as a share: 10 % is also 0.1."""
    return amount.value / 100 if amount.unit == PERCENT else amount.value


def _for_math_verify(gold: str) -> str:
    r"""A gold answer as math-verify reads it: of `1 1/2` it would take the 1.

    >>> [_for_math_verify(gold) for gold in ("1 1/2", "10%", r"1 000\%", "1 1/2 percent", "x + 1")]
    ['3/2', '10\\%', '1000\\%', '3/200', 'x + 1']
    """
    amount = read_number(gold)
    if amount is None:
        return gold
    # The sign lets it take 10 and 0.1 for 10 %. It divides by all that stands behind a slash: 3/2 % would be 150.
    is_whole_percentage = amount.unit == PERCENT and amount.value.denominator == 1
    return rf"{amount.value}\%" if is_whole_percentage else str(_share(amount))


class _Worker:
    """A process that compares answers, started when it is first needed and again after it was killed."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def compare(self, gold: str, answer: str) -> bool | None:
        """Whether two answers are equal, None where the process did not say so in time.

        Raises:
            RuntimeError: The process does not start.
            ValueError: math-verify cannot read the gold answer.
        """
        process = self._started()
        said = self._ask(process, {"gold": gold, "answer": answer}, self._timeout_s)
        if said is None:
            return None
        if "gold_error" in said:
            raise ValueError(f"math-verify cannot read the gold answer {gold!r}: {said['gold_error']}")
        return bool(said["equal"])

    def kill(self) -> None:
        """Ends the process and waits for its end."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.kill()
        # A file of its own: importing this package there would load torch into every worker.
        command = [sys.executable, "-P", str(WORKER), str(self._timeout_s)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._process = process
        if self._ask(process, {"gold": "1", "answer": "1"}, START_TIMEOUT_S) is None:
            raise RuntimeError(f"the process that compares answers did not start: {' '.join(command)}")
        return process

    def _ask(
        self, process: "subprocess.Popen[bytes]", request: dict[str, str], timeout_s: float
    ) -> dict[str, Any] | None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:  # it was killed, for its memory perhaps
            self.kill()
            return None
        ready, _, _ = select.select([process.stdout], [], [], timeout_s)
        line = process.stdout.readline() if ready else b""
        if not line:
            self.kill()
            return None
        said: dict[str, Any] = json.loads(line)
        return said
