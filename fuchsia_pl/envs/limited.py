"""Calls functions in child processes with limits of time and memory, for code that reads what a policy wrote."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fuchsia_pl.envs import limited_server as wire
from fuchsia_pl.types import ConfigError

SERVER = Path(wire.__file__)
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0
# Seconds of wall-clock time for each CPU second of a call, and beyond: a loaded machine does not end a call that computes.
WALL_PER_CPU = 10.0
WALL_EXTRA_S = 2.0
MAX_REPLY_BYTES = 64 * wire.MEGABYTE
MAX_TRIES = 3  # of a call whose server ended
MAX_START_BYTES = 65_536
TIME_SIGNALS = (signal.SIGPROF, signal.SIGXCPU)


class WorkersNotStarted(RuntimeError):
    """The function cannot be loaded, or the process that loads it does not start. No argument is the cause."""


class WorkerFailure(RuntimeError):
    """A call in a child process has no result. The argument may be the cause."""


class WorkerTimeout(WorkerFailure):
    """The call took too long and was killed."""


class WorkerDied(WorkerFailure):
    """The process of the call ended without a result: by a signal, by `os._exit`, or with a reply that is not one."""


class WorkerError(WorkerFailure):
    """The function raised an exception.

    Attributes:
        type: Name of the class of the exception.
        text: Its message, at most 500 characters.
    """

    def __init__(self, type: str, text: str) -> None:
        super().__init__(f"{type}: {text}" if text else type)
        self.type = type
        self.text = text


# Bound of a call of a reward that waits for workers. Many groups share them, so the wait of one depends on the answers of
# all, and what ends an answer is its own limit.
QUEUE_TIMEOUT_S = 7200.0


class LimitedWorkers:
    """Calls `function(argument)` in a new child process per call, forked from a process that has loaded the function.

    Argument and result are what JSON can express. They travel as JSON in both directions: reading a result runs no code, also if
    the function runs code that a policy wrote. No call finds anything that an earlier one left in memory.

    Limits of a call: CPU time, wall-clock time, address space, no data written to files, no core dump, size of the result.
    Whatever a call starts is killed after it. Its standard streams are /dev/null. Not covered: files that the user may delete,
    the network, signals to other processes of the user. This is no sandbox for code that is written to break out.

    Results are a function of the argument: the hash seed of strings and the global random generators (`random`, numpy) have a
    fixed seed in each call.

    Args:
        function: Dotted path of a function of a module, such as "my_module.score".
        num_workers: Maximum number of concurrent calls. Further ones wait.
        memory_mb: Address space that a call may take in MiB, in addition to what the loaded modules take.
        seed: The seed of strings' hashes and of the global random generators.
        opening: If it is not None, the path is that of a function which is called once with it, before any call, and returns the
            function of the calls. Data that takes long to load is then loaded once.

    Raises:
        ConfigError: A number is out of range, or the path has no dot.

    >>> with contextlib.closing(LimitedWorkers("math.factorial")) as workers:
    ...     workers.call(20, timeout_s=5.0)
    2432902008176640000
    """

    def __init__(
        self, function: str, num_workers: int = 1, memory_mb: int = 2048, seed: int = 0, opening: Any = None
    ) -> None:
        if "." not in function:
            raise ConfigError(f"LimitedWorkers requires a dotted path such as 'my_module.score', got {function!r}")
        if num_workers < 1 or memory_mb < 1:
            raise ConfigError(
                f"LimitedWorkers requires num_workers and memory_mb of 1 or more, got {num_workers} and {memory_mb}"
            )
        self.function = function
        self.num_workers = num_workers
        self._settings = {"function": function, "memory_mb": memory_mb, "seed": seed, "opening": opening}
        self._slots = threading.BoundedSemaphore(num_workers)
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def call(self, argument: Any, timeout_s: float) -> Any:
        """The result of the function. May be called from several threads.

        Args:
            argument: The argument, as JSON can express it.
            timeout_s: Limit in CPU seconds, so that a result does not depend on the load of the machine. In wall-clock time
                the limit is ten times as much and two seconds.

        Raises:
            WorkerTimeout: It took longer.
            WorkerError: The function raised an exception.
            WorkerDied: The process ended without a result.
            WorkersNotStarted: The function cannot be loaded.
            ValueError: The limit is not above 0.
        """
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
        body = json.dumps(argument).encode()
        with self._slots:
            for _ in range(MAX_TRIES):
                server = self._started()
                with contextlib.suppress(_ServerEnded):
                    return server.call(body, timeout_s)
        raise WorkerDied(f"the process that forks calls of {self.function} ended, or could not fork, {MAX_TRIES} times")

    def close(self) -> None:
        """Ends all processes. The next call starts them again."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.close()

    def _started(self) -> "_Server":
        with self._lock:
            if self._server is not None and self._server.has_ended():
                self._server.close()
                self._server = None
            if self._server is None:
                self._server = _Server(self._settings)
            return self._server


class _ServerEnded(Exception):
    """The server ended, so the call has neither a result nor a status."""


class _Server:
    """The process that forks.

    Raises:
        WorkersNotStarted: The function cannot be loaded, or not in time.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        nowhere = subprocess.DEVNULL
        # Threads of numerical libraries would not exist in a fork.
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(SERVER), str(theirs.fileno()), json.dumps({**settings, "path": sys.path})],
                pass_fds=[theirs.fileno()],
                stdin=nowhere,
                stdout=nowhere,
                stderr=nowhere,
                env={**os.environ, **single, "PYTHONHASHSEED": str(settings["seed"])},
            )
        try:
            self._await_start(str(settings["function"]))
        except BaseException:
            self.close()
            raise

    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def call(self, body: bytes, timeout_s: float) -> Any:
        """The result of a call, see `LimitedWorkers.call`.

        Raises:
            _ServerEnded: The server ended first.
        """
        channel, channel_end = socket.socketpair()
        lifeline, lifeline_end = socket.socketpair()
        until = time.monotonic() + WALL_PER_CPU * timeout_s + WALL_EXTRA_S
        with channel, lifeline:
            with channel_end, lifeline_end:
                try:
                    socket.send_fds(self._control, [wire.CALL], [channel_end.fileno(), lifeline_end.fileno()])
                except OSError as error:
                    raise _ServerEnded from error
            try:
                reply = _exchange(channel, wire.REQUEST.pack(timeout_s, len(body)) + body, until)
            except TimeoutError as error:
                self._await_status(lifeline)
                raise WorkerTimeout(_too_long(timeout_s)) from error
            status = self._await_status(lifeline)
        if reply is None:
            raise _failure(status, timeout_s)
        return _read(reply)

    def close(self) -> None:
        """Ends the process and waits for its end. All running calls end with it."""
        self._control.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel ends it later
            self._process.wait(END_TIMEOUT_S)

    def _await_start(self, function: str) -> None:
        self._control.settimeout(START_TIMEOUT_S)
        try:
            message = self._control.recv(MAX_START_BYTES)
        except TimeoutError as error:
            raise WorkersNotStarted(f"{function} was not loaded within {START_TIMEOUT_S:g} s") from error
        if not message:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT_S)
            raise WorkersNotStarted(
                f"the process that loads {function} ended with exit code {self._process.returncode}"
            )
        said = json.loads(message)
        if wire.ERROR in said:
            raise WorkersNotStarted(f"{function} cannot be loaded ({': '.join(said[wire.ERROR])})")

    def _await_status(self, lifeline: socket.socket) -> int:
        """Kills the call if it still runs, and waits for its end."""
        with contextlib.suppress(OSError):
            lifeline.shutdown(socket.SHUT_WR)
        lifeline.settimeout(END_TIMEOUT_S)
        try:
            said = lifeline.recv(wire.STATUS.size, socket.MSG_WAITALL)
        except OSError as error:  # also TimeoutError: the server does not respond
            self._process.kill()
            raise _ServerEnded from error
        if len(said) < wire.STATUS.size:
            raise _ServerEnded
        return int(wire.STATUS.unpack(said)[0])


def _exchange(channel: socket.socket, request: bytes, until: float) -> bytes | None:
    """Sends a request and returns the reply; None if the channel ends before.

    Raises:
        TimeoutError: There is no reply in time.
        WorkerDied: The reply is too large.
    """
    try:
        _limit_time(channel, until)
        channel.sendall(request)
        header = _exactly(channel, wire.REPLY.size, until)
        size = wire.REPLY.unpack(header)[0] if header is not None else 0
        if size > MAX_REPLY_BYTES:
            raise WorkerDied(f"its result has {size} bytes, more than {MAX_REPLY_BYTES}")
        return _exactly(channel, size, until) if header is not None else None
    except (BrokenPipeError, ConnectionResetError):
        return None


def _exactly(channel: socket.socket, size: int, until: float) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        _limit_time(channel, until)
        part = channel.recv(min(size - len(found), wire.MEGABYTE))
        if not part:
            return None
        found += part
    return bytes(found)


def _limit_time(channel: socket.socket, until: float) -> None:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    channel.settimeout(left)


def _read(reply: bytes) -> Any:
    """The result in a reply, which a hostile call may have written.

    Raises:
        WorkerError: The function raised an exception.
        WorkerDied: It is not a reply.
    """
    try:
        said = json.loads(reply)
        if wire.RESULT in said:
            return said[wire.RESULT]
        kind, text = said[wire.ERROR]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WorkerDied(f"its reply is not valid ({type(error).__name__})") from error
    raise WorkerError(str(kind), str(text)[: wire.MAX_ERROR_CHARS])


def _failure(status: int, timeout_s: float) -> WorkerFailure:
    """The exception for a process that ended without a reply."""
    if not os.WIFSIGNALED(status):
        return WorkerDied(f"its process ended with exit code {os.WEXITSTATUS(status)}")
    number = os.WTERMSIG(status)
    if number in TIME_SIGNALS:
        return WorkerTimeout(_too_long(timeout_s))
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"  # real-time signals
    return WorkerDied(f"its process was ended by {name}")


def _too_long(timeout_s: float) -> str:
    return f"it took more than {timeout_s:g} s of CPU time, or ten times that in all"
