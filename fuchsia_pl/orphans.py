"""No process outlives the run that started it, however that ended.

A small process watches the run's. A parent-death signal would come when the *thread* that started a child ends, and a pipe
stays open in every process that inherits it; both need code in each child, which vLLM's have only seconds after their start.
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
# Asking, then forcing. The helpers of Python's `multiprocessing`, which remove what the others left, are let alone at first.
ROUNDS = ((signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0))
TRACKER_S = 2.0
LAST_ROUND_S = 2.0
NOTHING = 0  # a signal that no process gets
TRACKER = b"multiprocessing.resource_tracker"
# torchrun's ranks have it. Without their agent nothing starts them again, or tells them that another is gone.
LAUNCHED_VARIABLE = "TORCHELASTIC_RUN_ID"
LAUNCHER_ROUNDS = ((signal.SIGTERM, 4.0), (signal.SIGKILL, 1.0))
# Without it, processes that change their title (vLLM's do) overwrite the environment that others see.
KEEP_ENVIRONMENT = "SPT_NOENV"
CODE = "import sys; sys.path.append(sys.argv[1]); from fuchsia_pl.orphans import main; main(*sys.argv[2:])"

_watchers: list["subprocess.Popen[bytes]"] = []


def watch() -> None:
    """From now on, whatever this process starts ends within seconds after it, by whatever it ended. Once is enough."""
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
            # Isolated and without site-packages: it starts at once, takes little memory and imports nothing of a user's.
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
    """The process of the same run that started this one: the first rank, of those that Lightning starts. None elsewhere."""
    parent = os.getppid()
    with contextlib.suppress(OSError):
        return parent if _carries(os.getpid(), owner_name(parent)) else None
    return None


def main(owner: str, process: str, launcher: str = "") -> None:
    """Waits for the end of a process, ends what carries its name and removes what it left.

    Args:
        owner: That name.
        process: Its id and start.
        launcher: Those of a process that it must not outlive; nobody else would end it then.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # those are for the run
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
    """Ends every process that carries a name in its environment, and removes the shared memory that they had."""
    segments = mapped_segments(owned(owner))
    for number, seconds in ROUNDS:
        _end(lambda: [pid for pid in owned(owner) if not _is_tracker(pid)], number, seconds)
    _end(lambda: owned(owner), NOTHING, TRACKER_S)
    _end(lambda: owned(owner), signal.SIGKILL, LAST_ROUND_S)
    remove_segments(segments)


def owned(owner: str) -> list[int]:
    """The processes, other than this one, that carry a name in their environment."""
    found = []
    for pid in running():
        with contextlib.suppress(OSError):
            if _carries(pid, owner) and started_at(pid) is not None:
                found.append(pid)
    return [pid for pid in found if pid != os.getpid()]


def end_tree(pid: int) -> None:
    """Kills a process and all that it started."""
    for child in [*descendants(pid), pid]:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """What a process started, what those started, and so on."""
    parents = {child: _parent(child) for child in running()}
    found = [pid]
    for known in found:  # which grows meanwhile
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
    """Whether a process was started with a name in its environment, whatever it has put there since."""
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
