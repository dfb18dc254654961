"""Work in progress on the console: a line at the bottom of a terminal, or a plain line now and then."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fuchsia_pl.callbacks.console_table import MIN_WIDTH, clock
from fuchsia_pl.progress import HELD_OUT, REPEATED, SAMPLING, SYNC, TRAINING, Activity, progress

REFRESHES_PER_S = 4
ERASE_LINE = "\r\x1b[2K"
# Work of this many seconds gets a line when it ends.
LONG_S = 2.0
# Without a terminal, work in progress gets a line after this many seconds without any other line.
SILENT_S = 60.0
BEAT_S = 5.0
MIN_BAR, MAX_BAR = 8, 40
RECENT_STEPS = 20
# Where several activities are in progress, the first of these is shown; activities before training come before all.
ORDER = (TRAINING, SYNC, HELD_OUT, SAMPLING)


class RunConsole(Console):
    """A console that never hides the cursor, which a killed process could not show again."""

    def show_cursor(self, show: bool = True) -> bool:
        """Does nothing."""
        return False


class Pace:
    """Steps of a run, and an estimate of the time that the rest takes.

    Args:
        step: Number of completed steps at the start.
        total: Number of steps at the end; None if it is unknown.
        now: The start in seconds.

    >>> pace = Pace(step=0, total=10, now=0.0)
    >>> pace.stepped(1, now=5.0)
    >>> pace.stepped(2, now=7.0)
    >>> pace.left(now=7.0), pace.left(now=8.0)
    (28.0, 27.0)
    """

    def __init__(self, step: int, total: int | None, now: float) -> None:
        self.step = step
        self.total = total
        self._ends: deque[tuple[int, float]] = deque([(step, now)], maxlen=RECENT_STEPS + 1)

    def stepped(self, step: int, now: float) -> None:
        """Records the end of a step."""
        self.step = step
        self._ends.append((step, now))

    def left(self, now: float) -> float | None:
        """Seconds until the end, by the mean duration of the latest steps; None if it is unknown."""
        (first, start), (last, end) = self._ends[0], self._ends[-1]
        if self.total is None or last == first:
            return None
        return max((self.total - last) * (end - start) / (last - first) - (now - end), 0.0)

    @property
    def text(self) -> str:
        """The step in progress.

        >>> Pace(3, 25, 0.0).text, Pace(25, 25, 0.0).text, Pace(3, None, 0.0).text
        ('step 4/25', 'step 25/25', 'step 4')
        """
        if self.total is None:
            return f"step {self.step + 1}"
        return f"step {min(self.step + 1, self.total)}/{self.total}"


class ProgressDisplay:
    """Shows the work in progress of this process.

    On a terminal, its last line shows the work, a bar, and the time. Elsewhere, long work gets a plain line at its end, and
    during it after `SILENT_S` seconds without any line.

    Args:
        console: Where it is shown.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.pace: Pace | None = None  # set during training
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._is_open = False
        self._copy: TextIO | None = None
        self._closed = threading.Event()
        self._silent_since = 0.0

    def open(self) -> None:
        """Shows all work from now on. Returns at once if it does already, or if the console is quiet."""
        if self._is_open or self.console.quiet:
            return
        self._is_open, self._closed = True, threading.Event()
        if sys.__stdout__ is not None and self.console.file is sys.__stdout__:
            # While an engine starts, file descriptor 1 is its log.
            self._copy = _copy_of(sys.__stdout__)
            self.console.file = self._copy or sys.__stdout__
        self.wrote()
        progress.watch(self)
        if not self._has_line:
            threading.Thread(target=self._beat, args=(self._closed,), name="console", daemon=True).start()

    def close(self) -> None:
        """Shows nothing from now on, and removes the line at the bottom of the terminal."""
        progress.unwatch(self)
        self._closed.set()
        self._is_open = False
        self.end_training()
        self._stop()
        if self._copy is not None and sys.__stdout__ is not None:
            self.console.file = sys.__stdout__
            self._copy.close()
            self._copy = None

    def begin_training(self, pace: Pace) -> None:
        """Keeps the line at the bottom of the terminal until `end_training`."""
        self._stop()
        self.pace = pace
        self._start()

    def end_training(self) -> None:
        """Removes the line at the bottom of the terminal."""
        self.pace = None
        self._stop()

    def wrote(self) -> None:
        """Notes that the console got a line."""
        self._silent_since = time.monotonic()

    def started(self, activity: Activity) -> None:
        """Shows the line at the bottom of the terminal."""
        self._start()

    def ended(self, activity: Activity, is_complete: bool) -> None:
        """Removes the line at the bottom of the terminal after the last work; writes a line about long work."""
        if self.pace is None and not progress.current:
            self._stop()
        if is_complete and activity.seconds >= LONG_S and activity.name not in REPEATED:
            self._write(finished_line(activity))

    @property
    def shown(self) -> Activity | None:
        """The work that is shown: what the run waits for."""
        current = progress.current
        last = len(current)
        places = [ORDER.index(one.name) if one.name in ORDER else -1 for one in current]
        return min(zip(places, range(last), current, strict=True), default=(0, 0, None))[2]

    @property
    def _has_line(self) -> bool:
        return self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.quiet

    def _start(self) -> None:
        with self._lock:
            if self._live is not None or not self._is_open or not self._has_line:
                return
            # During training, what other code prints appears above the line. Before that, an engine starts: its library keeps
            # the streams that it finds, which must be the process's own.
            redirects = self.pace is not None
            self._live = Live(
                console=self.console,
                get_renderable=self._line,
                transient=True,
                refresh_per_second=REFRESHES_PER_S,
                redirect_stdout=redirects and sys.stdout.isatty(),
                redirect_stderr=redirects and sys.stderr.isatty(),
            )
            self._live.start(refresh=True)
            progress.line_start = ERASE_LINE

    def _stop(self) -> None:
        with self._lock:
            if self._live is not None:
                live, self._live = self._live, None
                live.stop()
                progress.line_start = ""

    def _line(self) -> Table:
        """The line at the bottom of the terminal."""
        return progress_line(self.pace, self.shown, self.console.width, time.monotonic())

    def _write(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)
        self.wrote()

    def _beat(self, closed: threading.Event) -> None:
        """Writes lines about long work until the display is closed."""
        while not closed.wait(BEAT_S):
            activity = self.shown
            if activity is not None and time.monotonic() - self._silent_since >= SILENT_S:
                where = f"{self.pace.text}: " if self.pace else ""
                self._write(f"{where}{activity_text(activity)}, {clock(activity.seconds)} so far")


@contextmanager
def shown_progress(console: Console) -> Iterator[None]:
    """Inside the `with` block, a console shows the work in progress."""
    display = ProgressDisplay(console)
    display.open()
    try:
        yield
    finally:
        display.close()


def activity_text(activity: Activity) -> str:
    """What is done, and how much of it.

    >>> activity_text(Activity("sampling", total=64, unit="rollouts")), activity_text(Activity("loading the model"))
    ('sampling 0/64 rollouts', 'loading the model')
    """
    if activity.total is None:
        return activity.name
    if activity.name in (SAMPLING, HELD_OUT) and activity.done == activity.total:
        return f"{activity.name}: rewards of {activity.total} {activity.unit}"
    return f"{activity.name} {activity.done:,}/{activity.total:,} {activity.unit}".rstrip()


def finished_line(activity: Activity) -> str:
    """The line about work that has ended.

    >>> finished_line(Activity("rendering training prompts", total=7473, unit="prompts"))
    'rendering training prompts took 0:00 (7,473 prompts)'
    """
    amount = "" if activity.total is None else f" ({activity.total:,} {activity.unit})".replace(" )", ")")
    return f"{activity.name} took {clock(activity.seconds)}{amount}"


def progress_line(pace: Pace | None, activity: Activity | None, width: int, now: float) -> Table:
    """One line: the step, the work in progress, a bar, and the time.

    Args:
        pace: The steps of the run; None before training.
        activity: The work; None between two activities.
        width: Width of the console. The line is one column narrower, since some terminals wrap a full line.
        now: The current time in seconds.
    """
    words = [pace.text] if pace else []
    words += [activity_text(activity)] if activity else []
    times = [clock(activity.seconds)] if activity else []
    left = pace.left(now) if pace else None
    times += [f"{clock(left)} left"] if left is not None else []
    text, tail = "  ".join(words), ", ".join(times)
    width = max(width, MIN_WIDTH) - 1
    room = min(width - len(text) - len(tail) - 2, MAX_BAR)
    grid = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
    cells: list[Text | ProgressBar] = [Text(text[:width], no_wrap=True)]
    if activity is not None and room >= MIN_BAR:
        cells.append(ProgressBar(total=activity.total or None, completed=activity.done, width=room))
    if len(text) + len(tail) + 1 <= width:
        cells.append(Text(tail, no_wrap=True, style="dim"))
    for _ in cells:
        grid.add_column(no_wrap=True)
    grid.add_row(*cells)
    return grid


def _copy_of(stream: TextIO) -> TextIO | None:
    """A stream that writes to the same place also after the descriptor of `stream` was redirected; None if it has none."""
    try:
        return open(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors="backslashreplace")
    except (OSError, ValueError):
        return None
