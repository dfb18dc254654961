"""Findings of `fuchsia doctor`, and checks that always end: after an error or a time limit they are findings too."""

import contextlib
import io
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        check: What was checked, such as "disk".
        state: "ok", "note" (was not checked), "warning" (runs, but slowly or not for long), "problem" (a run fails).
        text: What was found.
        advice: What to do about it; "" for "ok".

    >>> Finding("disk", "ok", "12 GB are free").advice
    ''
    """

    check: str
    state: State
    text: str
    advice: str = ""


Check = Callable[[], Sequence[Finding]]


def bounded(name: str, check: Check, timeout_s: float) -> list[Finding]:
    """The findings of a check, or one about the error that it raised or the time that it took.

    Args:
        name: Name of the check.
        check: Runs in a thread. What it prints to stderr is kept for the finding of an error.
        timeout_s: Time limit in seconds. A thread that takes longer is left behind; it does not keep the process alive.

    >>> bounded("sum", lambda: [Finding("sum", "ok", "2")], 5.0)
    [Finding(check='sum', state='ok', text='2', advice='')]
    >>> bounded("sum", lambda: 1 / 0, 5.0)[0].text
    'ZeroDivisionError: division by zero'
    """
    result: list[Finding] = []
    ends: list[BaseException] = []
    printed = io.StringIO()

    def run() -> None:
        try:
            result.extend(check())
        except BaseException as end:  # a SystemExit is how the parser refuses a config
            ends.append(end)

    thread = threading.Thread(target=run, name=f"doctor {name}", daemon=True)
    with contextlib.redirect_stderr(printed):
        thread.start()
        thread.join(timeout_s)
    if thread.is_alive():
        advice = "start it again with more time, or look at what this check waits for (network, disk, tool server)"
        return [Finding(name, "problem", f"the check did not end within {timeout_s:g} s", advice)]
    if ends:
        return [Finding(name, "problem", error_text(ends[0], printed.getvalue()), ADVICE_ERROR)]
    return list(result)


ADVICE_ERROR = "change what the message names"


def error_text(end: BaseException, printed: str = "") -> str:
    r"""An error in one line; for the exit of the parser, the lines that it printed.

    >>> error_text(SystemExit(2), "error: no such key\nAll keys: fuchsia fit --help-all\n")
    'no such key'
    """
    lines = [line.removeprefix("error: ") for line in printed.splitlines() if line.startswith("error: ")]
    if isinstance(end, SystemExit) and lines:
        return "; ".join(lines)
    words = " ".join(str(end).split())
    name = type(end).__name__
    if name == "ConfigError":
        return words
    return f"{name}: {words}" if words else name


def worst(findings: Sequence[Finding]) -> State:
    """The worst state.

    >>> worst([Finding("a", "ok", ""), Finding("b", "warning", "")]), worst([])
    ('warning', 'ok')
    """
    order: list[Any] = ["ok", "note", "warning", "problem"]
    return max((finding.state for finding in findings), key=order.index, default="ok")
