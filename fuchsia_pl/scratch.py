"""Temporary files and folders that carry their owner's name, so that those of dead processes can be told and removed."""

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
# In the environment of every process that a run starts: whose it is.
OWNER_VARIABLE = "FUCHSIA_OWNER"
# A file in a scratch folder that names segments of shared memory, which go with the folder.
SEGMENTS_FILE = "segments"
SEGMENT = re.compile(r"/dev/shm/((?:psm_|sem\.)[\w.-]+)")
# A process may be between making its folder and writing a name that another can read; user, machine, process and its start.
NAME = re.compile(r"fuchsia-(?P<uid>\d+)-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-")


def started_at(pid: int) -> str | None:
    """When a process started, in the kernel's ticks since boot; None where it has ended, waited for by its parent or not.

    >>> started_at(os.getpid()) is None, started_at(2**30)
    (False, None)
    """
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def owner_name(pid: int | None = None) -> str:
    """Of a process, this one where none is given: its user, its machine, its id and its start, since ids are used again."""
    pid = pid or os.getpid()
    return f"fuchsia-{os.getuid()}-{_machine()}-{pid}-{started_at(pid) or 0}"


def scratch_folder(kind: str, place: Path | None = None) -> "tempfile.TemporaryDirectory[str]":
    """A folder that nobody else can read, removed with the object, or by the next run where this process was killed.

    Args:
        kind: What it is for, a part of its name.
        place: Where it is made; None: the folder for temporary files.
    """
    return tempfile.TemporaryDirectory(prefix=f"{owner_name()}-{kind}-", dir=place)


def scratch_file(kind: str, suffix: str) -> Path:
    """A file like `scratch_folder`'s, which its user removes."""
    handle, name = tempfile.mkstemp(prefix=f"{owner_name()}-{kind}-", suffix=suffix)
    os.close(handle)
    return Path(name)


def record_segments(folder: Path, pids: Iterable[int]) -> None:
    """Notes in a scratch folder which segments of shared memory processes have: their names do not say whose they are."""
    lines = [f"{name} {inode}\n" for name, inode in mapped_segments(pids).items()]
    (folder / SEGMENTS_FILE).write_text("".join(lines))


def mapped_segments(pids: Iterable[int]) -> dict[str, int]:
    """Names and inodes of the segments of Python's shared memory that processes have mapped and that still have a name."""
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
    """Removes what dead processes of this user on this machine left behind; returns what that was.

    What another user, a process that lives, or one of another machine or container owns is left alone.
    """
    removed: list[Path] = []
    if started_at(os.getpid()) is None:
        return removed  # nothing tells here who lives
    for place in {RAM_BACKED, Path(tempfile.gettempdir())}:
        for entry in place.iterdir() if place.is_dir() else ():
            match = NAME.match(entry.name)
            is_ours = match and int(match["uid"]) == os.getuid() and match["machine"] == _machine()
            if match and is_ours and started_at(int(match["pid"])) != match["start"] and _remove(entry):
                removed.append(entry)
    return removed


def _remove(entry: Path) -> bool:
    """Removes a file or folder that this user owns, and the segments that it names."""
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
        remove_segments({name: int(inode) for name, _, inode in named if inode.isdecimal()})  # the last may be cut off
        shutil.rmtree(entry, ignore_errors=True)
        return True
    return False


def remove_segments(inodes: Mapping[str, int]) -> None:
    """Removes segments of shared memory which were mapped, and possibly made, by processes that have ended.

    One that a living process has mapped too may be that process's own, and stays; so does another user's.

    Args:
        inodes: The names, and which file each was then.
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
    """Of machines and containers that may share a folder: one name for those that count the same processes."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text()
        words = boot + os.readlink(PROC / "self/ns/pid")
    except OSError:
        words = os.uname().nodename
    return hashlib.sha256(words.encode()).hexdigest()[:8]
