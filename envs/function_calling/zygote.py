"""Loads IPython once and forks an interpreter for each rollout: a fork takes milliseconds, a start most of a second.

Three processes for each: this one forks a supervisor, which enters namespaces and forks the interpreter. Whichever ends, the ones
below it end too.
"""

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from typing import NoReturn

from IPython.core.interactiveshell import InteractiveShell

from envs.function_calling import sandbox
from envs.function_calling.interpreter import make_shell, serve
from envs.function_calling.sandbox import Limits

# As root, interpreters get users of their own from here on, so that none may touch another's files or processes.
FIRST_UID = 600_000
UIDS_PER_SERVER = 1000


@dataclass(frozen=True)
class Cell:
    """Where an interpreter lives.

    Attributes:
        limits: Of its processes.
        max_output_chars: Of a cell.
        uid: As root, the user that it becomes.
        is_apart: Whether the system lets it have namespaces of its own.
    """

    limits: Limits
    max_output_chars: int
    uid: int
    is_apart: bool

    @property
    def has_private_tmp(self) -> bool:
        """Whether its files go with its mounts."""
        return self.is_apart and os.getuid() == 0


def main() -> None:
    """Forks a session for each channel that arrives, until the server closes its end."""
    control = socket.socket(fileno=int(sys.argv[1]))
    limits, max_output_chars = Limits(**json.loads(sys.argv[2])), int(sys.argv[3])
    sandbox.die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    is_apart = sandbox.can_leave_namespaces()
    if os.getuid() == 0 and not is_apart and sandbox.closed_folders():
        sys.exit(
            "the interpreter must not run as root, and here no other user can load Python from "
            f"{sandbox.closed_folders()}, nor does the system allow namespaces: run the training as another user, or use a "
            "Python that everyone may read"
        )
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the supervisors
    shell = make_shell()
    control.send(b"r")
    number = 0
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        channel = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            control.close()
            uid = FIRST_UID + os.getppid() * UIDS_PER_SERVER + number % UIDS_PER_SERVER
            supervise(shell, channel, Cell(limits, max_output_chars, uid, is_apart))
        channel.close()
        number += 1


def supervise(shell: InteractiveShell, channel: socket.socket, cell: Cell) -> NoReturn:
    """Starts the interpreter in a sandbox, and ends all that it started once it or the server has ended."""
    folder = "" if cell.has_private_tmp else tempfile.mkdtemp(prefix="fuchsia-ipython-")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: _end(folder))
    sandbox.die_with_parent(signal.SIGTERM)
    os.setsid()
    sandbox.adopt_orphans()
    if cell.is_apart:
        sandbox.leave_namespaces()
    channel.sendall(json.dumps({"pid": os.getpid()}).encode() + b"\n")
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            enter(cell, folder)
            serve(shell, channel, cell.max_output_chars)
        finally:
            os._exit(0)
    channel.close()
    while os.waitpid(-1, 0)[0] != child:  # adopted orphans end here too
        pass
    _end(folder)


def enter(cell: Cell, folder: str) -> None:
    """Gives up all that an interpreter does not need."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if cell.has_private_tmp:
        sandbox.hide_files(cell.limits.file_mb)
        folder = tempfile.mkdtemp()
    if os.getuid() == 0:
        os.chown(folder, cell.uid, cell.uid)
        cell.limits.apply_to_user()
        sandbox.become(cell.uid)
    os.chdir(folder)
    os.environ["HOME"] = folder
    cell.limits.apply()
    # Changing the user clears it, so it comes last.
    sandbox.die_with_parent(signal.SIGKILL)


def _end(folder: str) -> NoReturn:
    sandbox.end_descendants()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
