"""Script of the process that loads a function once and forks a process for each call, started by `limited.py`.

Standard library only. A fork takes milliseconds, the imports of the function may take seconds. This process has one thread and
calls no user code after the import, so a fork is safe.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

REQUEST = struct.Struct(">dQ")  # CPU seconds, length of the argument in bytes
REPLY = struct.Struct(">Q")  # length in bytes
STATUS = struct.Struct(">i")  # of `os.waitpid`
CALL = b"c"  # to this process, with the descriptors of channel and lifeline
RESULT, ERROR = "result", "error"
MAX_ERROR_CHARS = 500
RECURSION_LIMIT = 1000
SHORTEST_S = 1e-6  # a timer of 0 would be off
MEGABYTE = 2**20
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PROC = Path("/proc")
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass
class Server:
    """The process that forks.

    Attributes:
        control: Connection to the run. Its end is the end of this process.
        function: The function.
        memory_bytes: Limit of the address space of a call.
        random_state: State of the generator of `random` in each call; Python seeds it anew in every fork.
        calls: Lifeline of each running call by the id of its process. It carries the status of the process to the run; if the
            run closes it, the process is killed.
    """

    control: socket.socket
    function: Callable[[Any], Any]
    memory_bytes: int
    random_state: Any
    calls: dict[int, socket.socket] = field(default_factory=dict)

    def serve(self) -> None:
        """Forks and reaps until the run closes the connection. All calls end with this process."""
        ended, woken = os.pipe()
        os.set_blocking(ended, False)
        os.set_blocking(woken, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        while True:
            lifelines = {lifeline.fileno(): pid for pid, lifeline in self.calls.items()}
            ready = select.select([self.control.fileno(), ended, *lifelines], [], [])[0]
            with contextlib.suppress(BlockingIOError):
                os.read(ended, 4096)
            for descriptor in lifelines.keys() & set(ready):  # not reaped yet, so the id is still that of the call
                _kill_group(lifelines[descriptor])
            self.reap()
            if self.control.fileno() in ready and not self.accept():
                return

    def accept(self) -> bool:
        """Forks a process for a call. Returns whether there was one; there is none after the run has closed the connection."""
        message, descriptors, _, _ = socket.recv_fds(self.control, len(CALL), 2)
        if not message:
            return False
        channel, lifeline = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        with channel:
            try:
                pid = os.fork()
            except OSError:  # the system has no more processes: the run sees a lifeline that ends without a status
                lifeline.close()
                return True
            if pid == 0:
                run_call(self, channel)
        self.calls[pid] = lifeline
        return True

    def reap(self) -> None:
        """Sends the status of each ended call to the run. Kills what the call has started and left."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if found.si_pid in self.calls:
                    _kill_group(found.si_pid)
                _, status = os.waitpid(found.si_pid, 0)
                lifeline = self.calls.pop(found.si_pid, None)
                if lifeline is not None:
                    with lifeline, contextlib.suppress(OSError):  # the run does not wait for it any more
                        lifeline.sendall(STATUS.pack(status))
            _kill_children(but=self.calls.keys())  # those that have left the group of their call


def main() -> None:
    """Loads the function, reports the result of that, and serves calls."""
    control = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run handles Ctrl-C
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    sys.path[:] = settings["path"]
    try:
        module, _, name = settings["function"].rpartition(".")
        function = getattr(importlib.import_module(module), name)
        if settings["opening"] is not None:
            function = function(settings["opening"])
    except BaseException as error:  # also a SystemExit of the module
        control.sendall(json.dumps({ERROR: _described(error)}).encode())
        return
    control.sendall(json.dumps({RESULT: None}).encode())
    _seed(settings["seed"])
    gc.collect()
    gc.freeze()  # a collection in a call would copy the memory that it shares with this process
    memory_bytes = _mapped_bytes() + settings["memory_mb"] * MEGABYTE
    Server(control, function, memory_bytes, random.getstate()).serve()


def run_call(server: Server, channel: socket.socket) -> NoReturn:
    """Calls the function in this process, which ends afterwards.

    Args:
        server: Its function and limits. The process keeps no descriptor of it.
        channel: Brings the argument and takes the result.
    """
    code = 1
    try:
        parent = os.getppid()
        _leave(channel)
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            cpu_s, size = REQUEST.unpack(_exactly(channel, REQUEST.size))
            _limit(cpu_s, server.memory_bytes)
            random.setstate(server.random_state)
            body = _outcome(server.function, _exactly(channel, size))
            channel.sendall(REPLY.pack(len(body)))
            channel.sendall(body)
            code = 0
    finally:
        os._exit(code)


def _outcome(function: Callable[[Any], Any], argument: bytes) -> bytes:
    try:
        return json.dumps({RESULT: function(json.loads(argument))}).encode()
    except BaseException as error:  # also SystemExit: the function ends its own call only
        return json.dumps({ERROR: _described(error)}).encode()


def _described(error: BaseException) -> list[str]:
    try:
        text = str(error)[:MAX_ERROR_CHARS]
    except Exception:  # the class may be one of the function
        text = ""
    return [type(error).__name__, text]


def _limit(cpu_s: float, memory_bytes: int) -> None:
    """The timer ends the process at its CPU limit. If the function replaces the timer, the limit of the system acts."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, max(cpu_s, SHORTEST_S))
    whole_s = math.ceil(cpu_s) + 1
    for kind, value in {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: whole_s,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(kind, (value, value))
    sys.setrecursionlimit(RECURSION_LIMIT)


def _seed(seed: int) -> None:
    """Seeds the global random generators. Every call starts with this state, so its result depends on the argument alone."""
    random.seed(seed)
    if "numpy" in sys.modules:  # it loads its generators late
        importlib.import_module("numpy.random").seed(seed)


def _leave(channel: socket.socket) -> None:
    """Leaves the process group and every descriptor of the server, except the channel."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.closerange(3, channel.fileno())
    os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))


def _exactly(channel: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = channel.recv(min(size - len(found), MEGABYTE))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


def _kill_group(pid: int) -> None:
    """Kills a call that is not reaped, and its process group, of which it is the first from its first instructions on."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


def _kill_children(but: Collection[int]) -> None:
    for pid in _children():
        if pid not in but:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _children() -> list[int]:
    """The processes whose parent is this one, also those that it has adopted."""
    own = os.getpid()
    try:
        return [int(pid) for pid in (PROC / f"{own}/task/{own}/children").read_text().split()]
    except OSError:  # a kernel without this file
        found = []
    for entry in os.listdir(PROC):
        with contextlib.suppress(OSError, ValueError):
            if int((PROC / entry / "stat").read_text().rpartition(")")[2].split()[1]) == own:
                found.append(int(entry))
    return found


def _mapped_bytes() -> int:
    return int((PROC / "self" / "statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    main()
