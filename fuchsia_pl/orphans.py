"""Ends all processes that a run started, however the run ended.

A small watcher process waits for the end of the run's process. A parent-death signal is sent when the *thread* that started a
child ends, and a pipe stays open in every process that inherits it. Both need code in each child, and vLLM's children run such
code only seconds after their start.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuchsia_pl
from fuchsia_pl.scratch import (
    OWNER_VARIABLE,
    PROC,
    mapped_segments,
    owner_name,
    remove_left_behind,
    remove_segments,
    running,
    started_at,
)

POLL_S = 0.5
# SIGTERM, then SIGKILL. The resource trackers of `multiprocessing`, which clean up after other processes, get none at first.
ROUNDS = ((signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0))
TRACKER_S = 2.0
LAST_ROUND_S = 2.0
NO_SIGNAL = 0  # the system delivers nothing for this number
TRACKER = b"multiprocessing.resource_tracker"
# Set in the ranks of torchrun. Without its agent, no process restarts them or detects the end of another rank.
LAUNCHED_VARIABLE = "TORCHELASTIC_RUN_ID"
LAUNCHER_ROUNDS = ((signal.SIGTERM, 4.0), (signal.SIGKILL, 1.0))
# Without this variable, processes that change their title, like vLLM's, overwrite the environment in /proc.
KEEP_ENVIRONMENT = "SPT_NOENV"
CODE = "import sys; sys.path.append(sys.argv[1]); from fuchsia_pl.orphans import main; main(*sys.argv[2:])"

_watchers: list["subprocess.Popen[bytes]"] = []


def watch() -> None:
    """Starts the watcher: every process that this one starts ends within seconds after it. Later calls do nothing."""
    owner = owner_name()
    if os.environ.get(OWNER_VARIABLE) == owner or not PROC.is_dir():
        return
    os.environ[OWNER_VARIABLE], os.environ[KEEP_ENVIRONMENT] = owner, "1"
    root = str(Path(fuchsia_pl.__file__).parents[1])
    nowhere = subprocess.DEVNULL
    watched = [os.getpid(), *([os.getppid()] if LAUNCHED_VARIABLE in os.environ else [])]
    names = [f"{pid}:{started_at(pid)}" for pid in watched]
    _watchers.append(
        subprocess.Popen(
            # Isolated and without site-packages: the watcher starts fast, needs little memory and imports no user code.
            [sys.executable, "-I", "-S", "-c", CODE, root, owner, *names],
            stdin=nowhere,
            stdout=nowhere,
            stderr=nowhere,
            env={},
            cwd="/",
            start_new_session=True,
        )
    )


def parent_in_run() -> int | None:
    """Id of the parent process if it belongs to the same run (the first rank, for ranks that Lightning starts), else None."""
    parent = os.getppid()
    with contextlib.suppress(OSError):
        return parent if _carries(os.getpid(), owner_name(parent)) else None
    return None


def main(owner: str, process: str, launcher: str = "") -> None:
    """Waits for the end of a process, then ends the processes that it owned and removes its files.

    Args:
        owner: Owner name of the process.
        process: Id and start of the process.
        launcher: Id and start of a launcher. If the launcher ends first, the watcher ends the process.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # signals to the terminal's processes are for the run
        signal.signal(number, signal.SIG_IGN)
    pid = int(process.partition(":")[0])
    while _lives(process):
        if launcher and not _lives(launcher):
            for number, seconds in LAUNCHER_ROUNDS:
                _end(lambda: [pid] if _lives(process) else [], number, seconds)
        time.sleep(POLL_S)
    end_owned(owner)
    remove_left_behind()


def end_owned(owner: str) -> None:
    """Ends every process with an owner in its environment, and removes the shared memory of these processes."""
    segments = mapped_segments(owned(owner))
    for number, seconds in ROUNDS:
        _end(lambda: [pid for pid in owned(owner) if not _is_tracker(pid)], number, seconds)
    _end(lambda: owned(owner), NO_SIGNAL, TRACKER_S)
    _end(lambda: owned(owner), signal.SIGKILL, LAST_ROUND_S)
    remove_segments(segments)


def owned(owner: str) -> list[int]:
    """Ids of the processes, other than this one, with an owner in their environment."""
    found = []
    for pid in running():
        with contextlib.suppress(OSError):
            if _carries(pid, owner) and started_at(pid) is not None:
                found.append(pid)
    return [pid for pid in found if pid != os.getpid()]


def end_tree(pid: int) -> None:
    """Kills a process and its descendants."""
    for child in [*descendants(pid), pid]:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Ids of the children of a process, of their children, and so on."""
    parents = {child: _parent(child) for child in running()}
    found = [pid]
    for known in found:  # the loop appends to it
        found += [child for child, parent in parents.items() if parent == known and child not in found]
    return found[1:]


def _end(remaining: Callable[[], list[int]], number: int, seconds: float) -> None:
    signalled: set[int] = set()
    until = time.monotonic() + seconds
    while (pids := remaining()) and time.monotonic() < until:
        for pid in set(pids) - signalled:
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        signalled |= set(pids)
        time.sleep(POLL_S / 5)


def _carries(pid: int, owner: str) -> bool:
    """Whether a process was started with an owner in its environment."""
    return f"{OWNER_VARIABLE}={owner}".encode() in (PROC / str(pid) / "environ").read_bytes().split(b"\0")


def _parent(pid: int) -> int | None:
    try:
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _lives(process: str) -> bool:
    pid, _, start = process.partition(":")
    return started_at(int(pid)) == start


def _is_tracker(pid: int) -> bool:
    try:
        return TRACKER in (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
