"""The figures of a check, and the outcome that they make."""

import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Result = Literal["pass", "fail", "not here"]
SIGNS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


class NotHereError(Exception):
    """This machine lacks what a check needs. The message is the reason."""


@dataclass(frozen=True)
class Figure:
    """One line of a check. `holds` is False where a bar was missed; `values` are the numbers of the text, by name."""

    text: str
    holds: bool = True
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """What a check's process sends to its parent. The end comes last: the pipe may stay open in a process that is left."""

    kind: Literal["figure", "device", "not here", "crash", "end"]
    content: Any


class Findings:
    """Collects the figures of a check. Each is sent at once, so that those before a crash or a time-out are kept.

    Args:
        send: Sends a message to the parent.
        is_named: Whether the user chose this check by name.
    """

    def __init__(self, send: Callable[[Message], None], is_named: bool = False) -> None:
        self._send, self.is_named = send, is_named

    def note(self, text: str, **values: Any) -> None:
        """Adds a figure without a bar."""
        self._send(Message("figure", Figure(text, True, values)))

    def require(self, holds: bool, text: str, **values: Any) -> None:
        """Adds a figure that fails the check unless it holds."""
        self._send(Message("figure", Figure(text, bool(holds), values)))

    def bar(self, text: str, value: float, sign: Literal["<=", ">=", "=="], bar: float) -> None:
        """Adds a number with its bar. A NaN misses every bar."""
        shown = f"{text} {value:.3g} ({sign.replace('==', 'must be')} {bar:g})"
        self._send(Message("figure", Figure(shown, SIGNS[sign](value, bar), {text: value})))

    def device(self, label: str) -> None:
        """Names the device and the number type."""
        self._send(Message("device", label))


@dataclass
class Outcome:
    """What a check found."""

    name: str
    title: str
    device: str = ""
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    reason: str = ""  # why it was not run
    is_skipped: bool = False

    @property
    def result(self) -> Result:
        """The verdict over all figures. A check without a single figure has shown nothing, and fails."""
        if self.is_skipped:
            return "not here"
        return "pass" if self.figures and all(figure.holds for figure in self.figures) else "fail"

    def take(self, message: Message) -> Figure | None:
        """Adds a message of the check's process; returns the figure if it is one."""
        if message.kind == "device":
            self.device = message.content
            return None
        if message.kind == "not here":
            self.is_skipped, self.reason = True, message.content
            return None
        figure = message.content if message.kind == "figure" else Figure(message.content, False)
        self.figures.append(figure)
        return figure

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {**asdict(self), "result": self.result}
