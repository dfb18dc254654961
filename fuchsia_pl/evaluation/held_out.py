"""`held_out.jsonl`: a line per evaluation of a run. This module imports no libraries, so that reports load fast."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fuchsia_pl.evaluation.figures import Figure
from fuchsia_pl.files import append_lines

HELD_OUT_FILE = "held_out.jsonl"
ITEMS_FILE = "evaluation.jsonl"  # a line per item


@dataclass(frozen=True)
class HeldOut:
    """One evaluation on a held-out split.

    Attributes:
        step: Optimizer steps that the evaluated policy was trained for; 0 before training.
        split: "validation" or "test".
        num_items: Items.
        num_samples: Samples per item.
        environment: Class name of the environment.
        figures: Figures by the name of their metric without the split, such as "rollout/accuracy".
        num_shared: Items whose prompt is also the prompt of a training item; None if the training items are not known.

    >>> evaluation = HeldOut(25, "validation", 64, 1, "Arithmetic", {"rollout/accuracy": Figure(0.5, 0.38, 0.62)})
    >>> held_out_of(json.loads(held_out_line(evaluation))) == evaluation
    True
    """

    step: int
    split: str
    num_items: int
    num_samples: int
    environment: str
    figures: dict[str, Figure] = field(default_factory=dict)
    num_shared: int | None = None

    @property
    def key(self) -> tuple[int, str, str]:
        """What distinguishes the evaluations of a run."""
        return self.step, self.split, self.environment


def held_out_line(evaluation: HeldOut) -> str:
    """The line of an evaluation, with its line end. An interval that does not exist is null."""
    values: dict[str, Any] = {one.name: getattr(evaluation, one.name) for one in fields(evaluation)}
    values["figures"] = {
        name: {end: _number(getattr(figure, end)) for end in ("value", "low", "high")}
        for name, figure in evaluation.figures.items()
    }
    return json.dumps(values) + "\n"


def held_out_of(loaded: dict[str, Any]) -> HeldOut:
    """The evaluation of a line that was read.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It is no such line.
    """
    figures = {
        str(name): Figure(*(math.nan if ends[end] is None else float(ends[end]) for end in ("value", "low", "high")))
        for name, ends in loaded["figures"].items()
    }
    names = {one.name for one in fields(HeldOut)}
    return HeldOut(**{name: value for name, value in loaded.items() if name in names} | {"figures": figures})


def write_held_out(folder: Path, evaluations: Iterable[HeldOut]) -> None:
    """Appends evaluations to the file of a run folder, all or none.

    Raises:
        DiskError: They could not be written.
    """
    text = "".join(held_out_line(evaluation) for evaluation in evaluations)
    if text:
        append_lines(folder / HELD_OUT_FILE, text)


def read_held_out(folder: Path) -> list[HeldOut]:
    """The evaluations of a run folder in the order in which they were made. A damaged line is left out."""
    try:
        lines = (folder / HELD_OUT_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(held_out_of(json.loads(line)))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            continue
    return found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
