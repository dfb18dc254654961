"""How signals end a process: the first requests an orderly end, the second ends it at once."""

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

from fuchsia_pl.progress import progress

T = TypeVar("T")

GRACE_S = 30.0
# The signal that ranks of a run send each other. It never counts as a second signal.
RANK_SIGNAL = signal.SIGUSR2
# A signal this soon after the first counts as the same one: a terminal and a launcher may both send it.
SECOND_AFTER_S = 1.0
# Limit for saving and closing, where each wait has its own limit.
CLOSING_S = 300.0
# Limit for the exit of the interpreter.
LEAVING_S = 30.0
POLL_S = 0.5


class Stopped(SystemExit):
    """The process received a signal to end. Only the main thread raises this.

    Args:
        signum: The signal.

    >>> Stopped(signal.SIGTERM).code
    143
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class Stopping:
    """The signals that this process received, and the state of its orderly end.

    The signal handler raises `Stopped` in the main thread where an interruption is safe: before training begins, and inside
    `interruptible`. Elsewhere it stores the signal, and the next `interruptible` block raises. A second thread receives each
    signal too, because the main thread may be in a call that no handler interrupts. That thread ends the process if the main
    thread exceeds its time limit, and on the second signal.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held while the thread handles a signal, and while the state is reset
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
        self.is_agreed = False  # all ranks have agreed to end
        self.checkpoint: Path | None = None  # the checkpoint to resume from
        self.step: int | None = None  # the step of that checkpoint
        self.continued: Path | None = None  # a file that the same command continues
        self.forward: Callable[[int], None] | None = (
            None  # sends a signal to other ranks, or to a rank that forwards it
        )
        self._raises = True
        self._has_raised = False
        self._first_at: float | None = None
        self._deadline: float | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Inside the `with` block, in the main thread, handles SIGTERM and SIGINT. After a signal the process ends."""
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
        """Installs handlers for SIGTERM and SIGINT in the main thread, once; returns whether this call installed them."""
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
        self.listen(RANK_SIGNAL, signal.SIGTERM)
        return True

    def restore(self) -> None:
        """Restores the earlier handlers and resets the state: the process continues."""
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
        """Installs the handler for a signal, unless the process was started to ignore it, as in the background of a shell.

        Args:
            number: The signal.
            meaning: The signal as which it is treated.
        """
        if self._wake is None or number in self._aliases or signal.getsignal(number) is signal.SIG_IGN:
            return
        self._aliases[number] = meaning
        self._before[number] = signal.signal(number, self._handle)

    def protect(self) -> None:
        """From this call on, signals raise only inside `interruptible`."""
        self._raises = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside the `with` block a signal raises `Stopped`, and so does one that was received before."""
        before, self._raises = self._raises, True
        try:
            if self.signum is not None:
                self._has_raised = True
                raise Stopped(self.signum)
            yield
        finally:
            self._raises = before

    def on_all_ranks(self, wait: Callable[[], T], highest: Callable[[int], int]) -> T:
        """Returns the result of a wait on all ranks; raises on all ranks if one of them received a signal.

        Args:
            wait: The wait of this rank, which a signal interrupts.
            highest: Exchanges a number between the ranks, and returns the maximum on each of them.

        Raises:
            Stopped: A rank received a signal.
        """
        result: Any = None
        try:
            with self.interruptible():
                result = wait()
        except BaseException:  # any error: the engine may have received the signal too, and ended first
            if self.signum is None:
                raise
        if self.agree(highest):
            assert self.signum is not None
            raise Stopped(self.signum)
        return result

    def agree(self, highest: Callable[[int], int]) -> bool:
        """Whether a rank received a signal. All ranks must call this together; see `on_all_ranks` for `highest`."""
        signum = highest(self.signum or 0)
        if signum:
            self._note(signum)
            self.is_agreed = True
        return self.is_agreed

    def allow(self, seconds: float) -> None:
        """Sets a new time limit, counted from now."""
        self._deadline = time.monotonic() + seconds
        if self._wake is not None:
            with contextlib.suppress(OSError):  # the buffer is full, and its content wakes the thread as well
                self._wake.send(b"\0")

    def close(self) -> None:
        """Sets the time limit of saving and closing, for a signal that was received or will be."""
        self._bound(CLOSING_S)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside the `with` block, applies the time limit of saving, for a signal before or during the block."""
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

    def write_line(self, text: str) -> None:
        """Writes a line to the console, even while standard error is redirected to a file."""
        with contextlib.suppress(OSError):
            start = progress.line_start if os.isatty(self._console) else ""
            os.write(self._console, f"{start}{text}\n".encode())

    def _note(self, signum: int) -> None:
        if self.signum is None:
            self.signum = signum
            self.allow(self.grace_s)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(self._aliases[number])
        if self._raises and not self._has_raised:
            self._has_raised = True  # only once: a second exception would interrupt the cleanup
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
            elif number != RANK_SIGNAL and now - self._first_at > SECOND_AFTER_S:
                self._end_now("a second signal: the process ends at once, without saving")
        if self._deadline is not None and now > self._deadline:
            self._end_now(
                "the current work did not end in time: the process ends without saving. The same command with --ckpt_path last "
                "continues from the newest checkpoint, if there is one"
            )

    def _begin(self, number: int) -> None:
        self._note(self._aliases[number])
        name = "another rank received a signal" if number == RANK_SIGNAL else signal.Signals(number).name
        if self.forward is not None:
            with contextlib.suppress(OSError):  # the other rank has ended
                self.forward(RANK_SIGNAL)
        if is_first_local():
            self.write_line(
                f"{name}: the run ends in order, with {self.grace_s:g} s for the current work and additional time for saving; a "
                "second signal ends it at once"
            )

    def _end_now(self, words: str) -> None:
        assert self.signum is not None
        self.write_line(words)
        os._exit(128 + self.signum)

    def _leave_to_parent(self) -> None:
        """Removes the handlers in a forked child, which shares the sockets of its parent but not its end."""
        self._lock = threading.Lock()  # the thread that may hold it does not exist in the child
        if self._before and os.getpid() != self._pid:
            signal.set_wakeup_fd(-1)
            for number in self._aliases:
                signal.signal(number, signal.SIG_DFL)


def is_first_local() -> bool:
    """Whether this is the first rank on its machine."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


stopping = Stopping()
