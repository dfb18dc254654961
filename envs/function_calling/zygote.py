"""Loads IPython once and forks an interpreter for each rollout: a fork takes milliseconds, a start most of a second.

This process forks a supervisor, which creates namespaces and forks the interpreter. If one of the three ends, those below it end.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from dataclasses import dataclass
from typing import NoReturn

from IPython.core.interactiveshell import InteractiveShell

from fuchsia_pl.library.function_calling import memory, mounts, sandbox, syscalls, wire
from fuchsia_pl.library.function_calling.interpreter import make_shell, serve
from fuchsia_pl.library.function_calling.sandbox import Limits, Offer

OUT_OF_MEMORY = b"m"  # written by a supervisor to the server before it ends


@dataclass(frozen=True)
class Cell:
    """Surroundings of an interpreter.

    Attributes:
        limits: Limits of its processes.
        max_output_chars: Output limit of a cell.
        uid: Its user, if the server is root.
        offer: Parts of the sandbox that the system supports.
    """

    limits: Limits
    max_output_chars: int
    uid: int
    offer: Offer


def main() -> None:
    """Forks a session for each received channel, until the server closes its end."""
    control = socket.socket(fileno=int(sys.argv[1]))
    limits, max_output_chars, offer = (
        Limits(**json.loads(sys.argv[2])),
        int(sys.argv[3]),
        Offer(**json.loads(sys.argv[4])),
    )
    sandbox.die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles Ctrl-C
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the supervisors
    shell = make_shell()
    control.send(b"r")
    first_uid = sandbox.first_uid(os.getppid())
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, wire.FORK.size, 2)
        if not message:
            return
        (number,) = wire.FORK.unpack(message)
        with contextlib.ExitStack() as stack:
            channel, lifeline = (stack.enter_context(socket.socket(fileno=found)) for found in descriptors)
            if _is_fork():
                control.close()
                supervise(shell, channel, lifeline, Cell(limits, max_output_chars, first_uid + number, offer))


def supervise(shell: InteractiveShell, channel: socket.socket, lifeline: socket.socket, cell: Cell) -> NoReturn:
    """Starts the interpreter in a sandbox. Ends all its processes after it or the server has ended.

    Args:
        shell: The interpreter.
        channel: Channel of its cells. This process keeps no end of it.
        lifeline: The interpreter ends when the server shuts this down or dies. The interpreter has no end of it.
        cell: Surroundings of the interpreter.
    """
    folder = "" if cell.offer.hides_files else tempfile.mkdtemp(prefix="fuchsia-ipython-")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: _end(folder))
    sandbox.die_with_parent(signal.SIGTERM)
    os.setsid()
    sandbox.adopt_orphans()
    if cell.offer.is_apart:
        sandbox.leave_namespaces()
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        os.setsid()  # a signal to its process group, which crosses namespaces, must not reach the supervisor
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            enter_or_report(cell, folder, channel, theirs)
            serve(shell, channel, cell.max_output_chars)
        finally:
            os._exit(0)
    channel.close()
    theirs.close()
    word = watch(child, lifeline, ours, cell)
    if cell.offer.is_apart:  # the kernel ends all processes of a namespace before its first
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    else:
        sandbox.end_descendants()
    with contextlib.suppress(OSError):  # the server may be dead
        lifeline.sendall(word)
    _end(folder)


def watch(child: int, lifeline: socket.socket, entered: socket.socket, cell: Cell) -> bytes:
    """Waits until the interpreter or the server has ended, or the memory limit is exceeded.

    Args:
        child: Process id of the interpreter.
        lifeline: Connection to the server.
        entered: Receives a descriptor of the interpreter's /proc when it is in its sandbox.
        cell: Surroundings of the interpreter.

    Returns:
        `OUT_OF_MEMORY`, or an empty word.
    """
    ended, limit = os.pidfd_open(child), cell.limits.memory_mb
    buffer_bytes = entered.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    with entered:
        waited: list[socket.socket] = [entered, lifeline]
        if lifeline in select.select(waited, [], [])[0]:
            return b""
        _, handles, _, _ = socket.recv_fds(entered, 1, 1)
    pause, last = 0.0, 0.0
    while not select.select([lifeline.fileno(), ended], [], [], pause)[0] and handles:
        _reap_orphans(child)
        left = limit - _used_mb(handles[0], cell.offer, buffer_bytes, limit)
        if left < 0:
            return OUT_OF_MEMORY
        pause, last = memory.pause_s(left, last, pause), left
    return b""


def _used_mb(proc: int, offer: Offer, buffer_bytes: int, limit: int) -> float:
    if not offer.hides_files:
        return memory.used_mb(proc, sandbox.descendants(os.getpid()), limit)
    pids = memory.processes(proc)
    return memory.used_mb(proc, pids, limit) + memory.socket_mb(proc, pids, buffer_bytes)


def enter_or_report(cell: Cell, folder: str, channel: socket.socket, entered: socket.socket) -> None:
    """Enters the sandbox. On a failure, sends the traceback through the channel: stderr may be closed by then."""
    try:
        enter(cell, folder, channel, entered)
    except BaseException:
        channel.sendall(traceback.format_exc().encode(errors="replace"))
        raise


def enter(cell: Cell, folder: str, channel: socket.socket, entered: socket.socket) -> None:
    """Drops all files, rights and descriptors that an interpreter does not need."""
    if cell.offer.hides_files:
        mounts.hide_files(cell.limits.file_mb)
        folder = tempfile.mkdtemp(dir=mounts.SCRATCH)
    if os.getuid() == 0:
        os.chown(folder, cell.uid, cell.uid)
    if os.getuid() == 0 or cell.offer.is_apart:
        cell.limits.apply_to_user()
    sandbox.become(cell.uid)
    os.chdir(folder)
    os.environ["HOME"] = folder
    socket.send_fds(entered, [b"p"], [os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)])
    keep_only(channel)
    cell.limits.apply()
    # A change of the user clears this setting, and the filter refuses it: it is set between the two.
    sandbox.die_with_parent(signal.SIGKILL)
    if cell.offer.is_filtered:
        syscalls.deny()


def _is_fork() -> bool:
    """Forks. Returns whether this is the new process. If the system refuses the fork, the server sees a closed channel."""
    try:
        return os.fork() == 0
    except OSError as error:
        sys.stderr.write(f"no interpreter can be forked: {error}\n")
        return False


def keep_only(channel: socket.socket) -> None:
    """Closes every descriptor except the channel. The standard ones become /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(3, channel.fileno())
    os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))


def _reap_orphans(child: int) -> None:
    """Reaps adopted orphans that have ended. Until then they count as processes."""
    while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if found.si_pid == child:
            return
        os.waitpid(found.si_pid, 0)


def _end(folder: str) -> NoReturn:
    sandbox.end_descendants()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
