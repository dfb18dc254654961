"""The table of a run on the console: one row per optimizer step, of numbers that fit their columns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIN_WIDTH = 60
STEP_WIDTH = 5
CELL_WIDTH = 8
GAP = "  "
LEFT = "left"
NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        metric: Name of the metric; `LEFT` for the time that the rest of the run takes.
        label: Title, at most `CELL_WIDTH` characters.
        decimals: Decimal places, of numbers that leave room for them.
        rank: Columns of a low rank stay where the console is too narrow for all.

    >>> Column("train/kl", "kl", decimals=4, rank=3).label
    'kl'
    """

    metric: str
    label: str
    decimals: int
    rank: int


COLUMNS = (
    Column("reward/mean", "reward", 3, 0),
    Column("rollout/accuracy", "accuracy", 3, 1),
    Column("train/kl", "kl", 4, 3),
    Column("rollout/completion_tokens", "length", 1, 4),
    Column("train/logprob_gap", "gap", 3, 5),
    Column("perf/step_seconds", "s/step", 1, 6),
    Column(LEFT, "left", 0, 2),
    Column("train/entropy", "entropy", 3, 8),
    Column("rollout/truncated_fraction", "cut off", 3, 7),
)


def shown_columns(names: Mapping[str, float], width: int) -> tuple[Column, ...]:
    """The columns whose metrics exist, as many as the console has room for.

    Args:
        names: The metrics that were logged.
        width: Width of the console.

    >>> [column.label for column in shown_columns({"reward/mean": 0.5, "train/kl": 0.1}, width=80)]
    ['reward', 'kl', 'left']
    """
    room = (max(width, MIN_WIDTH) - STEP_WIDTH) // (len(GAP) + CELL_WIDTH)
    found = [column for column in COLUMNS if column.metric in names or column.metric == LEFT]
    kept = sorted(found, key=lambda column: column.rank)[:room]
    return tuple(column for column in found if column in kept)


def header_row(columns: Sequence[Column]) -> str:
    """The titles of the columns.

    >>> header_row(COLUMNS[:2])
    ' step    reward  accuracy'
    """
    return GAP.join([f"{'step':>{STEP_WIDTH}}", *(f"{column.label:>{CELL_WIDTH}}" for column in columns)])


def step_row(step: int, columns: Sequence[Column], metrics: Mapping[str, float], left: float | None) -> str:
    """The row of an optimizer step.

    Args:
        step: Number of the step, from 1.
        columns: The columns of the header.
        metrics: Values by name. A missing one is shown as "-".
        left: Seconds that the rest of the run takes; None if unknown.

    >>> step_row(3, COLUMNS[:3], {"reward/mean": 0.5, "rollout/accuracy": float("nan")}, left=None)
    '    3     0.500       nan         -'
    """
    cells = [f"{step:>{STEP_WIDTH}}"]
    for column in columns:
        if column.metric == LEFT:
            text = clock(left)
        elif column.metric in metrics:
            text = number(metrics[column.metric], column.decimals)
        else:
            text = NOTHING
        cells.append(f"{text:>{CELL_WIDTH}}")
    return GAP.join(cells)


def number(value: float, decimals: int) -> str:
    """A number in at most `CELL_WIDTH` characters. One that is not 0 is never shown as 0.

    >>> number(0.5, 3), number(-1234.5678, 3), number(4e-7, 4), number(1e12, 1), number(-3.2e-150, 3)
    ('0.500', '-1234.57', '4.0e-07', '1.0e+12', '-3e-150')
    """
    if not math.isfinite(value):
        return str(value)
    for places in range(decimals, -1, -1):
        text = f"{value:.{places}f}"
        if value != 0 and float(text) == 0:
            break
        if len(text) <= CELL_WIDTH:
            return text
    text = f"{value:.1e}"
    return text if len(text) <= CELL_WIDTH else f"{value:.0e}"


def clock(seconds: float | None) -> str:
    """A duration in at most `CELL_WIDTH` characters.

    >>> clock(61.2), clock(3725), clock(200 * 3600.0), clock(None)
    ('1:01', '1:02:05', '8d 8h', '-')
    """
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    whole = max(round(seconds), 0)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours >= 100:
        days = hours // 24
        return f"{days}d {hours % 24}h" if days < 10_000 else NOTHING
    if hours:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}"
