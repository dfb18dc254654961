"""Curves and held-out figures from `metrics.csv`, `held_out.jsonl` and `warnings.jsonl`."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuchsia_pl.report.lines import LineReader
from fuchsia_pl.report.values import number, text, whole

METRICS_FILE = "metrics.csv"
HELD_OUT_FILE = "held_out.jsonl"
WARNINGS_FILE = "warnings.jsonl"
HELD_OUT_SPLITS = ("validation", "test")
NO_METRICS = ("step", "epoch", "")

Value = float | int | None


@dataclass
class Curves:
    """Metrics of a run's optimizer steps.

    Attributes:
        steps: Steps with logged metrics, counted from 1 and ascending.
        metrics: Name to one value per step; None where it was not logged or not finite.
        held_out: Held-out figures of `metrics.csv` by split and step, which counts the optimizer steps before the measurement.

    >>> Curves([1, 2], {"reward/mean": [0.5, None]}).metrics["reward/mean"][0]
    0.5
    """

    steps: list[int]
    metrics: dict[str, list[Value]]
    held_out: dict[tuple[str, int], dict[str, Value]] = field(default_factory=dict)


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of `metrics.csv`. An incomplete last row and a missing file are no error."""
    try:
        content = (folder / METRICS_FILE).read_bytes().decode("utf-8", "replace").replace("\0", "")
    except OSError:
        return []
    complete = content[: content.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(complete, newline=""))
    try:
        return [{name: value for name, value in row.items() if name and isinstance(value, str)} for row in rows]
    except csv.Error:  # a field of more than 128 kB, which no log has
        return []


def curves(rows: Iterable[Mapping[str, Any]]) -> Curves:
    """Curves of the rows of a log. A later row with the same step adds its metrics, and replaces equal ones.

    Lightning counts the steps of its rows from 0. A held-out row after the row of step s was measured after s + 1 steps, and one
    before the first row of a training step after none.

    >>> rows = [{"step": 0, "validation/a": 1}, {"step": 0, "b": 2}, {"step": 0, "validation/a": 3}]
    >>> curves(rows) == Curves([1], {"b": [2]}, {("validation", 0): {"a": 1}, ("validation", 1): {"a": 3}})
    True
    """
    by_step: dict[int, dict[str, Value]] = {}
    held_out: dict[tuple[str, int], dict[str, Value]] = {}
    num_steps = 0
    for row in rows:
        step = whole(row.get("step"), default=-1)
        if step < 0:
            continue
        given = {
            name: number(value) for name, value in row.items() if name not in NO_METRICS and value not in (None, "")
        }
        own = {name: value for name, value in given.items() if name.partition("/")[0] not in HELD_OUT_SPLITS}
        if own:
            num_steps = step + 1
            by_step.setdefault(num_steps, {}).update(own)
        for name in given.keys() - own.keys():
            split, _, figure = name.partition("/")
            held_out.setdefault((split, num_steps), {})[figure] = given[name]
    steps = sorted(by_step)
    names = sorted({name for found in by_step.values() for name in found})
    return Curves(steps, {name: [by_step[step].get(name) for step in steps] for name in names}, held_out)


def evaluations(folder: Path, logged: Curves, environment: str) -> list[dict[str, Any]]:
    """Every evaluation of a run, in order; of a run without `held_out.jsonl` those of `metrics.csv`, without intervals.

    Args:
        folder: The run folder.
        logged: Its metrics.
        environment: Name of the config's environment, which `metrics.csv` does not contain.
    """
    found = [_evaluation(line) for line in LineReader(folder / HELD_OUT_FILE).new()]
    if not found:
        found = [
            {
                "step": step,
                "split": split,
                "environment": environment,
                "num_items": None,
                "num_samples": None,
                "figures": {name: _figure({"value": value}) for name, value in sorted(figures.items())},
            }
            for (split, step), figures in logged.held_out.items()
        ]
    return sorted(found, key=lambda one: one["step"])


def warnings_of(folder: Path) -> list[dict[str, Any]]:
    """Warnings in words of a run, in order."""
    return [
        {
            "step": whole(line.get("step")),
            **{name: text(line.get(name)) for name in ("name", "metric", "text", "advice")},
        }
        for line in LineReader(folder / WARNINGS_FILE).new()
    ]


def _evaluation(line: Mapping[str, Any]) -> dict[str, Any]:
    figures = line.get("figures")
    return {
        "step": whole(line.get("step")),
        "split": text(line.get("split")),
        "environment": text(line.get("environment")),
        "num_items": number(line.get("num_items")),
        "num_samples": number(line.get("num_samples")),
        "figures": {
            str(name): _figure(given) for name, given in (figures if isinstance(figures, dict) else {}).items()
        },
    }


def _figure(given: Any) -> dict[str, Value]:
    fields = given if isinstance(given, dict) else {}
    return {name: number(fields.get(name)) for name in ("value", "low", "high")}
