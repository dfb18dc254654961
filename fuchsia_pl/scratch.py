"""Temporary files and folders with their owner in the name, so that those of ended processes are found and removed."""

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

PROC = Path("/proc")
RAM_BACKED = Path("/dev/shm")
# In the environment of every process that a run starts: the owner.
OWNER_VARIABLE = "FUCHSIA_OWNER"
# A file in a scratch folder that lists segments of shared memory, which are removed with the folder.
SEGMENTS_FILE = "segments"
SEGMENT = re.compile(r"/dev/shm/((?:psm_|sem\.)[\w.-]+)")
# User, machine, process and its start. They are in the name, since a process may end before it writes a file.
NAME = re.compile(r"fuchsia-(?P<uid>\d+)-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-")


def started_at(pid: int) -> str | None:
    """Start of a process in kernel ticks since boot; None if it has ended, even if its parent has not waited for it.

    >>> started_at(os.getpid()) is None, started_at(2**30)
    (False, None)
    """
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def owner_name(pid: int | None = None) -> str:
    """Name of a process (default: this one): user, machine, id, and start, since the system reuses ids."""
    pid = pid or os.getpid()
    return f"fuchsia-{os.getuid()}-{_machine()}-{pid}-{started_at(pid) or 0}"


def scratch_folder(kind: str, place: Path | None = None) -> "tempfile.TemporaryDirectory[str]":
    """A folder that only this user can read. It is removed with the object, or by the next run if this process was killed.

    Args:
        kind: Purpose of the folder, a part of its name.
        place: Parent folder; None is the folder for temporary files.
    """
    return tempfile.TemporaryDirectory(prefix=f"{owner_name()}-{kind}-", dir=place)


def scratch_file(kind: str, suffix: str) -> Path:
    """Path of a new file with such a name, which the caller removes."""
    handle, name = tempfile.mkstemp(prefix=f"{owner_name()}-{kind}-", suffix=suffix)
    os.close(handle)
    return Path(name)


def record_segments(folder: Path, pids: Iterable[int]) -> None:
    """Lists in a scratch folder the segments of shared memory of processes: the names of segments contain no owner."""
    lines = [f"{name} {inode}\n" for name, inode in mapped_segments(pids).items()]
    (folder / SEGMENTS_FILE).write_text("".join(lines))


def mapped_segments(pids: Iterable[int]) -> dict[str, int]:
    """Names and inodes of the segments of Python's shared memory that processes have mapped and that still exist."""
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found |= set(SEGMENT.findall((PROC / str(pid) / "maps").read_text()))
    inodes: dict[str, int] = {}
    for name in sorted(found):
        with contextlib.suppress(OSError):
            inodes[name] = (RAM_BACKED / name).stat().st_ino
    return inodes


def running() -> list[int]:
    """The ids of all processes."""
    return [int(entry) for entry in os.listdir(PROC) if entry.isdigit()]


def remove_left_behind() -> list[Path]:
    """Removes files and folders of this user's ended processes on this machine, and returns their paths.

    Files of other users, of running processes, and of other machines or containers are kept.
    """
    removed: list[Path] = []
    if started_at(os.getpid()) is None:
        return removed  # without /proc, running processes cannot be recognized
    for place in {RAM_BACKED, Path(tempfile.gettempdir())}:
        for entry in place.iterdir() if place.is_dir() else ():
            match = NAME.match(entry.name)
            is_ours = match and int(match["uid"]) == os.getuid() and match["machine"] == _machine()
            if match and is_ours and started_at(int(match["pid"])) != match["start"] and _remove(entry):
                removed.append(entry)
    return removed


def _remove(entry: Path) -> bool:
    """Removes a file or folder that this user owns, and the segments that it lists."""
    with contextlib.suppress(OSError):
        state = entry.lstat()
        if state.st_uid != os.getuid() or stat.S_ISLNK(state.st_mode):
            return False
        if not stat.S_ISDIR(state.st_mode):
            entry.unlink()
            return True
        segments = entry / SEGMENTS_FILE
        lines = segments.read_text().splitlines() if segments.is_file() else []
        named = [line.partition(" ") for line in lines]
        remove_segments(
            {name: int(inode) for name, _, inode in named if inode.isdecimal()}
        )  # the last line may be incomplete
        shutil.rmtree(entry, ignore_errors=True)
        return True
    return False


def remove_segments(inodes: Mapping[str, int]) -> None:
    """Removes segments of shared memory that were mapped by processes that have ended.

    Segments that a running process has mapped may belong to it and are kept, and so are those of other users.

    Args:
        inodes: Names, with the inode that each had when it was mapped.
    """
    in_use = mapped_segments(running()) if inodes else {}
    for name, inode in inodes.items():
        file = RAM_BACKED / name
        with contextlib.suppress(OSError):
            state = file.lstat()
            is_same = SEGMENT.fullmatch(str(file)) and state.st_ino == inode
            if is_same and name not in in_use and state.st_uid == os.getuid():
                file.unlink()


def _machine() -> str:
    """Id of this machine or container: equal only where process ids mean the same processes."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text()
        words = boot + os.readlink(PROC / "self/ns/pid")
    except OSError:
        words = os.uname().nodename
    return hashlib.sha256(words.encode()).hexdigest()[:8]
