"""Long work in progress: its name, how much of it is done, and since when. Displays watch it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# Work that repeats at every step. A display writes no line for each of these.
SAMPLING, HELD_OUT, TRAINING, SYNC = "sampling", "sampling held-out", "training", "sending weights"
SAVING = "saving a checkpoint"
REPEATED = (SAMPLING, HELD_OUT, TRAINING, SYNC, SAVING)


class Activity:
    """Work in progress. Any thread may call its methods.

    Args:
        name: What is done, such as "sampling".
        total: Number of all units; None if it is unknown.
        unit: Plural name of a unit, such as "rollouts".

    >>> activity = Activity("sampling", total=2, unit="rollouts")
    >>> activity.advance()
    >>> activity.expect(3)
    >>> activity.done, activity.total
    (1, 5)
    """

    def __init__(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.name = name
        self.unit = unit
        self.started_at = time.monotonic()
        self._lock = threading.Lock()
        self._done, self._total = 0, total

    @property
    def done(self) -> int:
        """Number of completed units. It never falls."""
        return self._done

    @property
    def total(self) -> int | None:
        """Number of all units; None if it is unknown."""
        return self._total

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_at

    def advance(self, number: int = 1) -> None:
        """Counts completed units."""
        with self._lock:
            self._done += number

    def expect(self, number: int) -> None:
        """Adds units to the total."""
        with self._lock:
            self._total = (self._total or 0) + number

    def report(self, done: int, total: int) -> None:
        """Sets both numbers, for work that a library counts."""
        with self._lock:
            self._done, self._total = max(done, self._done), total


class Watcher(Protocol):
    """A display of work in progress. Any thread may call it."""

    def started(self, activity: Activity) -> None:
        """Work has started."""

    def ended(self, activity: Activity, is_complete: bool) -> None:
        """Work has ended, by an error if it is not complete."""


class Progress:
    """The work in progress of this process, and the displays that watch it.

    >>> board = Progress()
    >>> with board.activity("loading the model") as activity:
    ...     [active.name for active in board.current]
    ['loading the model']
    >>> board.current
    ()
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watchers: tuple[Watcher, ...] = ()
        self.current: tuple[Activity, ...] = ()
        # Erases the line that a display keeps at the bottom of the terminal; "" without such a line. Code that writes to the
        # terminal past the display writes this first.
        self.line_start = ""

    @contextmanager
    def activity(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Activity]:
        """Inside the `with` block, the work is in progress. The arguments are those of `Activity`."""
        activity = Activity(name, total, unit)
        with self._lock:
            self.current = (*self.current, activity)
        is_complete = False
        try:
            for watcher in self._watchers:
                watcher.started(activity)
            yield activity
            is_complete = True
        finally:
            with self._lock:
                self.current = tuple(other for other in self.current if other is not activity)
            for watcher in self._watchers:
                watcher.ended(activity, is_complete)

    def watch(self, watcher: Watcher) -> None:
        """Calls a display from now on, once if it is added twice."""
        with self._lock:
            self._watchers = (*(other for other in self._watchers if other is not watcher), watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Calls a display no more."""
        with self._lock:
            self._watchers = tuple(other for other in self._watchers if other is not watcher)


progress = Progress()
