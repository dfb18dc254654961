"""The table of the outcomes, in Markdown and JSON."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gpu_check.findings import Figure, Outcome

SHOWN = {"pass": "pass", "fail": "**fail**", "not here": "not here"}


@dataclass(frozen=True)
class Run:
    """A run of the checks.

    Attributes:
        outcomes: What each check found, in order.
        date: The day, as 2026-11-27.
        seconds: Duration of the whole run.
    """

    outcomes: Sequence[Outcome]
    date: str
    seconds: float

    @property
    def counts(self) -> Counter[str]:
        """Number of checks by result."""
        return Counter(outcome.result for outcome in self.outcomes)

    @property
    def machine(self) -> str:
        """The device, as the check of the environment names it first."""
        found = [o.figures[0].text for o in self.outcomes if o.name == "environment" and o.figures]
        return found[0] if found else "this machine"

    def markdown(self) -> str:
        """A heading, one line with the counts, and the table."""
        counts = ", ".join(f"{number} {result}" for result, number in sorted(self.counts.items()))
        lines = [
            f"### {self.machine}",
            "",
            f"{self.date}, {self.seconds / 60:.1f} minutes: {counts}.",
            "",
            "| check | device | result | figures |",
            "|---|---|---|---|",
            *(row(outcome) for outcome in self.outcomes),
            "",
        ]
        return "\n".join(lines)

    def write(self, file: Path) -> None:
        """Writes the table, and the same as JSON beside it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.markdown())
        content = {
            "machine": self.machine,
            "date": self.date,
            "seconds": round(self.seconds, 1),
            "checks": [outcome.as_json() for outcome in self.outcomes],
        }
        file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def row(outcome: Outcome) -> str:
    """One line of the table. Failed figures come first."""
    if outcome.is_skipped:
        figures = escaped(outcome.reason)
    else:
        ordered = sorted(outcome.figures, key=lambda figure: figure.holds)
        figures = "<br>".join(figure_text(figure) for figure in ordered) or "no figures"
    name = f"`{outcome.name}`<br>{escaped(outcome.title)}"
    return f"| {name} | {outcome.device or '-'} | {SHOWN[outcome.result]} | {figures} |"


def figure_text(figure: Figure) -> str:
    """A figure in a cell; bold if its bar was missed."""
    return escaped(figure.text) if figure.holds else f"**{escaped(figure.text)}**"


def escaped(text: str) -> str:
    """Text that stays in its cell of a Markdown table.

    >>> escaped("a | b\\n<= 1 of <module>")
    'a \\\\| b <= 1 of &lt;module>'
    """
    return re.sub(r"<(?=[\w/!])", "&lt;", " ".join(text.split()).replace("|", "\\|"))
