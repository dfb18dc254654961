"""Loads IPython once and forks an interpreter for each rollout: a fork takes milliseconds, a start most of a second.

Three processes for each: this one forks a supervisor, which enters namespaces and forks the interpreter. Whichever ends, the ones
below it end too.
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
from dataclasses import dataclass
from typing import NoReturn

from IPython.core.interactiveshell import InteractiveShell

from envs.function_calling import memory, mounts, sandbox, syscalls
from envs.function_calling.interpreter import make_shell, serve
from envs.function_calling.sandbox import Limits, Offer

# As root, interpreters get users of their own from here on, so that none may touch another's files or processes.
FIRST_UID = 600_000
UIDS_PER_SERVER = 1000
OUT_OF_MEMORY = b"m"  # what a supervisor writes to the server before it ends


@dataclass(frozen=True)
class Cell:
    """Where an interpreter lives.

    Attributes:
        limits: Of its processes.
        max_output_chars: Of a cell.
        uid: As root, the user that it becomes.
        offer: What the system lets it have.
    """

    limits: Limits
    max_output_chars: int
    uid: int
    offer: Offer


def main() -> None:
    """Forks a session for each channel that arrives, until the server closes its end."""
    control = socket.socket(fileno=int(sys.argv[1]))
    limits, max_output_chars, offer = (
        Limits(**json.loads(sys.argv[2])),
        int(sys.argv[3]),
        Offer(**json.loads(sys.argv[4])),
    )
    sandbox.die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the supervisors
    shell = make_shell()
    control.send(b"r")
    number = 0
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not message:
            return
        channel, lifeline = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        if os.fork() == 0:
            control.close()
            uid = FIRST_UID + os.getppid() * UIDS_PER_SERVER + number % UIDS_PER_SERVER
            supervise(shell, channel, lifeline, Cell(limits, max_output_chars, uid, offer))
        channel.close()
        lifeline.close()
        number += 1


def supervise(shell: InteractiveShell, channel: socket.socket, lifeline: socket.socket, cell: Cell) -> NoReturn:
    """Starts the interpreter in a sandbox, and ends all that it started once it or the server has ended.

    Args:
        shell: The interpreter.
        channel: Where it finds cells. This process keeps no end of it.
        lifeline: The server shuts it down, or dies, where the interpreter shall end. The interpreter has no end of it.
        cell: Where it lives.
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
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            enter(cell, folder, channel, theirs)
            serve(shell, channel, cell.max_output_chars)
        finally:
            os._exit(0)
    channel.close()
    theirs.close()
    word = watch(child, lifeline, ours, cell)
    sandbox.end_descendants()
    with contextlib.suppress(OSError):  # the server may be dead
        lifeline.sendall(word)
    _end(folder)


def watch(child: int, lifeline: socket.socket, entered: socket.socket, cell: Cell) -> bytes:
    """Waits until the interpreter or the server has ended, or the memory is used up.

    Args:
        child: The interpreter.
        lifeline: To the server.
        entered: Where the interpreter sends a descriptor of the /proc with its processes, once it is in its sandbox.
        cell: Where it lives.

    Returns:
        `OUT_OF_MEMORY`, or nothing.
    """
    ended, limit = os.pidfd_open(child), cell.limits.memory_mb
    with entered:
        _, handles, _, _ = socket.recv_fds(entered, 1, 1)
    pause = 0.0
    while not select.select([lifeline, ended], [], [], pause)[0] and handles:
        _bury_orphans(child)
        pids = memory.processes(handles[0]) if cell.offer.hides_files else sandbox.descendants(os.getpid())
        left = limit - memory.used_mb(handles[0], pids, limit)
        if left < 0:
            return OUT_OF_MEMORY
        pause = memory.pause_s(left)
    return b""


def enter(cell: Cell, folder: str, channel: socket.socket, entered: socket.socket) -> None:
    """Gives up all that an interpreter does not need."""
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
    # Changing the user clears it, so it comes after that, and the filter refuses it.
    sandbox.die_with_parent(signal.SIGKILL)
    if cell.offer.is_filtered:
        syscalls.deny()


def keep_only(channel: socket.socket) -> None:
    """Closes every descriptor but the channel; the standard ones lead nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(3, channel.fileno())
    os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))


def _bury_orphans(child: int) -> None:
    """Adopted orphans that have ended count as processes until somebody waits for them."""
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
