"""How a process ends that was told to: the first signal asks for an orderly end, the second ends it at once."""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

GRACE_S = 30.0
# Between the ranks of a run, which all pass it on to each other. It never counts as a second signal.
TOLD = signal.SIGUSR2
# What comes this soon after the first signal is the same one: a terminal and what sends it to a whole family may both do so.
SECOND_AFTER_S = 1.0
# For saving and closing, all waits of which have bounds of their own.
CLOSING_S = 300.0
# For what the interpreter does at its end.
LEAVING_S = 30.0
POLL_S = 0.5


class Stopped(SystemExit):
    """The process was told to end. Nothing but its main thread raises this.

    Args:
        signum: The signal.

    >>> Stopped(signal.SIGTERM).code
    143
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class Stopping:
    """What the signals of this process have asked for, and what of it has been done.

    A signal's handler raises `Stopped` in the main thread where that may be interrupted: until training begins, and where
    `interruptible` says so. Elsewhere it only leaves a note, which the next interruptible place finds. A thread hears of each
    signal too, since the main thread may be deep in a call that no handler interrupts; it ends the process where the main
    thread takes too long, and on the second signal.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held where the thread acts on a signal, and where all is forgotten
        self._forget()
        self._aliases: dict[int, int] = {}
        self._before: dict[int, Any] = {}
        self._wake: socket.socket | None = None
        self._wakeup_before = -1
        self._console = -1
        self._pid = 0

    def _forget(self) -> None:
        self.grace_s = GRACE_S
        self.signum: int | None = None
        self.is_agreed = False  # all ranks end, and each knows it
        self.checkpoint: Path | None = None  # where to go on from
        self.step: int | None = None  # the newest that is in it
        self.forward: Callable[[int], None] | None = None  # sends a signal to other ranks, or to one that does
        self._raises = True
        self._has_raised = False
        self._first_at: float | None = None
        self._deadline: float | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Inside the `with` block, in the main thread, SIGTERM and SIGINT are handled here. A process that got one ends."""
        is_first = self.install()
        try:
            yield
        finally:
            if is_first and self.signum is None:
                self.restore()
            elif is_first:
                self._give_back()
                self.allow(LEAVING_S)

    def install(self) -> bool:
        """Handles SIGTERM and SIGINT here, if this is the main thread and nobody did so before; returns whether it did."""
        if threading.current_thread() is not threading.main_thread() or self._before:
            return False
        if self._wake is None:
            reader, self._wake = socket.socketpair()
            self._wake.setblocking(False)
            self._console, self._pid = os.dup(2), os.getpid()
            os.register_at_fork(after_in_child=self._leave_to_parent)
            threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        self._wakeup_before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self.listen(signal.SIGTERM, signal.SIGTERM)
        self.listen(signal.SIGINT, signal.SIGINT)
        self.listen(TOLD, signal.SIGTERM)
        return True

    def restore(self) -> None:
        """Leaves all signals to whom they belonged before, and forgets those that came: the process goes on."""
        with self._lock:
            self._raises = False
            self._give_back()
            self._forget()

    def _give_back(self) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._aliases = {}, {}

    def listen(self, number: int, meaning: int) -> None:
        """Handles a signal, unless it is one that this process was started to ignore, as in the background of a shell.

        Args:
            number: The signal.
            meaning: The signal that it counts as.
        """
        if self._wake is None or number in self._aliases or signal.getsignal(number) is signal.SIG_IGN:
            return
        self._aliases[number] = meaning
        self._before[number] = signal.signal(number, self._handle)

    def protect(self) -> None:
        """From now on a signal interrupts nothing outside of `interruptible`."""
        self._raises = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside the `with` block a signal raises `Stopped`, also one that came before."""
        before, self._raises = self._raises, True
        try:
            if self.signum is not None:
                self._has_raised = True
                raise Stopped(self.signum)
            yield
        finally:
            self._raises = before

    def on_all_ranks(self, wait: Callable[[], T], highest: Callable[[int], int]) -> T:
        """What a wait gives, on all ranks or, where one of them was told to end, on none.

        Args:
            wait: What may be interrupted, on each rank for itself.
            highest: Exchanges numbers between the ranks and gives the highest on all of them.

        Raises:
            Stopped: Some rank was told to end.
        """
        result: Any = None
        try:
            with self.interruptible():
                result = wait()
        except BaseException:  # whatever it is: an engine may have got the signal too, and have died first
            if self.signum is None:
                raise
        if self.agree(highest):
            assert self.signum is not None
            raise Stopped(self.signum)
        return result

    def agree(self, highest: Callable[[int], int]) -> bool:
        """Whether some rank was told to end. All ranks have to call it at the same time; for the argument see `on_all_ranks`."""
        signum = highest(self.signum or 0)
        if signum:
            self._note(signum)
            self.is_agreed = True
        return self.is_agreed

    def allow(self, seconds: float) -> None:
        """Bounds what is left to do anew, from now."""
        self._deadline = time.monotonic() + seconds
        if self._wake is not None:
            with contextlib.suppress(OSError):  # full of what wakes the thread as well
                self._wake.send(b"\0")

    def close(self) -> None:
        """From now on only saving and closing is left to do, which has its own time, also after a signal that is yet to come."""
        self._bound(CLOSING_S)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside the `with` block there is the time of saving, whether a signal came before or comes meanwhile."""
        before = self.grace_s
        self._bound(CLOSING_S)
        try:
            yield
        finally:
            self._bound(before)

    def _bound(self, seconds: float) -> None:
        self.grace_s = seconds
        if self.signum is not None:
            self.allow(seconds)

    def say(self, words: str) -> None:
        """Writes a line to the console, also where standard error goes to a file meanwhile."""
        with contextlib.suppress(OSError):
            os.write(self._console, f"{words}\n".encode())

    def _note(self, signum: int) -> None:
        if self.signum is None:
            self.signum = signum
            self.allow(self.grace_s)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(self._aliases[number])
        if self._raises and not self._has_raised:
            self._has_raised = True  # once: what cleans up behind it is not to be disturbed
            raise Stopped(self._aliases[number])

    def _watch(self, reader: socket.socket) -> None:
        while True:
            ready, _, _ = select.select([reader], [], [], POLL_S if self._deadline is not None else None)
            numbers = reader.recv(4096) if ready else b""
            with self._lock:
                self._act(numbers, time.monotonic())

    def _act(self, numbers: bytes, now: float) -> None:
        for number in numbers:
            if number not in self._aliases:
                continue
            if self._first_at is None:
                self._first_at = now
                self._begin(number)
            elif number != TOLD and now - self._first_at > SECOND_AFTER_S:
                self._end_now("a second signal: the process ends at once, without saving")
        if self._deadline is not None and now > self._deadline:
            self._end_now("what was going on did not end in time: the process ends without waiting for it")

    def _begin(self, number: int) -> None:
        self._note(self._aliases[number])
        name = "another rank was told to end" if number == TOLD else signal.Signals(number).name
        if self.forward is not None:
            with contextlib.suppress(OSError):  # it has ended
                self.forward(TOLD)
        if is_first_local():
            self.say(
                f"{name}: the run ends in order, within {self.grace_s:g} s for what is going on and the time of saving; a second "
                "signal ends it at once"
            )

    def _end_now(self, words: str) -> None:
        assert self.signum is not None
        self.say(words)
        os._exit(128 + self.signum)

    def _leave_to_parent(self) -> None:
        """A forked child is not the process that was told to end, and shares its sockets."""
        self._lock = threading.Lock()  # the thread that may hold it is not here
        if self._before and os.getpid() != self._pid:
            signal.set_wakeup_fd(-1)
            for number in self._aliases:
                signal.signal(number, signal.SIG_DFL)


def is_first_local() -> bool:
    """Whether this is the only rank on its machine, or the first."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


stopping = Stopping()
