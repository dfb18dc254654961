"""The state of a run in one sentence."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fuchsia_pl.run_record import RunRecord

NUM_RECENT_STEPS = 20


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Optimizer steps done.
        step_seconds: Durations of the logged steps, in order; None where it was not logged.

    >>> Progress(2, (30.0, 10.0)).seconds_per_step
    20.0
    """

    step: int
    step_seconds: Sequence[float | int | None] = ()

    @property
    def seconds_per_step(self) -> float | None:
        """Median of the last steps: the first ones may contain warm-ups. None if no duration was logged."""
        recent = [seconds for seconds in self.step_seconds if seconds is not None][-NUM_RECENT_STEPS:]
        return statistics.median(recent) if recent else None


def status_of(record: RunRecord | None, progress: Progress, now: datetime | None = None) -> dict[str, Any]:
    """The status of a run as the page takes it.

    Args:
        record: `run.json`, None for a run without one.
        progress: How far it is.
        now: The current time.
    """
    if record is None:
        words = f"{steps(progress.step)} logged; the folder has no run.json, so how the run ended is not recorded"
        return _fields("unknown", words, progress.step, None)
    outcome = record.current_outcome
    step = max(record.step, progress.step) if record.command == "fit" else record.step
    begun, ended = _time(record.started_at), _time(record.ended_at)
    until = ended if ended is not None else (now or datetime.now(UTC)) if outcome == "running" else None
    seconds = max((until - begun).total_seconds(), 0.0) if begun is not None and until is not None else None
    left = _seconds_left(record, step, progress) if outcome == "running" else None
    words = _words(record, outcome, step, seconds, left)
    return {**_fields(outcome, words, step, record), "seconds": seconds, "seconds_left": left}


def steps(number: int) -> str:
    """A number of steps.

    >>> steps(1), steps(25)
    ('1 step', '25 steps')
    """
    return f"{number} step{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A duration in words.

    >>> duration(3.2), duration(200), duration(7260), duration(200000)
    ('3 s', '3 min 20 s', '2 h 1 min', '2 d 7 h')
    """
    whole = round(seconds)
    for size, name, smaller_size, smaller_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // smaller_size} {smaller_name}"
    return f"{whole} s"


def _fields(outcome: str, words: str, step: int, record: RunRecord | None) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "words": words,
        "reason": record.reason if record is not None else "",
        "step": step,
        "max_steps": record.max_steps if record is not None else None,
        "started_at": record.started_at if record is not None else None,
        "ended_at": record.ended_at if record is not None else None,
        "seconds": None,
        "seconds_left": None,
    }


def _words(record: RunRecord, outcome: str, step: int, seconds: float | None, left: float | None) -> str:
    is_training = record.command == "fit"
    if outcome == "running":
        return _running(record, step, left) if is_training else f"{record.command}: running"
    place = f" after step {step}" if step else " before the first step" if is_training else ""
    if outcome == "finished":
        took = f" in {duration(seconds)}" if seconds is not None else ""
        return f"finished after {steps(step)}{took}" if is_training else f"{record.command}: finished{took}"
    if outcome == "stopped":
        return f"stopped by {record.reason}{place}" if record.reason else f"stopped{place}"
    if outcome == "failed":
        return f"failed{place}: {record.reason}" if record.reason else f"failed{place}"
    return f"killed{place}"


def _running(record: RunRecord, step: int, left: float | None) -> str:
    if not step:
        return "starting, no step is done yet"
    if record.max_steps is None:
        return f"step {step}, without a limit of steps"
    return f"step {step} of {record.max_steps}" + (f", about {duration(left)} left" if left is not None else "")


def _seconds_left(record: RunRecord, step: int, progress: Progress) -> float | None:
    if record.max_steps is None or progress.seconds_per_step is None:
        return None
    return max(record.max_steps - step, 0) * progress.seconds_per_step


def _time(written: str | None) -> datetime | None:
    try:
        found = datetime.fromisoformat(written) if written else None
    except (ValueError, TypeError):
        return None
    return found.replace(tzinfo=UTC) if found is not None and found.tzinfo is None else found
