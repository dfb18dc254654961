"""The files visible to an interpreter: the system and Python, read-only, and a scratch folder. Standard library only."""

import ctypes
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 1, 2
CLONE_NEWNS = 0x00020000
# Visible folders at the top of the file tree. Every other folder there is hidden, except for the Python modules in it.
SYSTEM = ("bin", "etc", "lib", "lib32", "lib64", "libx32", "nix", "opt", "proc", "sbin", "sys", "usr")
DEVICES = ("full", "null", "random", "urandom")  # not /dev/zero: a mapping of it is shared memory that is not counted
SCRATCH = "/tmp"
ALSO_SCRATCH = ("/dev/shm", "/var/tmp")
MAX_TERMINALS = 32  # the host has a limited number
LIBC = ctypes.CDLL(None, use_errno=True)


def hide_files(scratch_mb: int) -> None:
    """Gives this process a mount namespace in which all is read-only except a private /tmp. It must be root in its namespaces.

    /dev/shm and /var/tmp are the same folder as /tmp, so that one size limits all written files. /proc shows the process ids
    of the own namespace. They differ from those of the host: a supervisor that used them would kill unrelated processes.

    Args:
        scratch_mb: Size of /tmp, in MiB.

    Raises:
        OSError: The kernel refuses a mount.
    """
    if LIBC.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "the system allows no mounts of one's own")
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    folders = [str(entry) for entry in Path("/").iterdir() if entry.is_dir() and not entry.is_symlink()]
    hidden = {folder for folder in folders if folder[1:] not in SYSTEM}
    for entry in Path("/").iterdir():
        if not entry.is_dir() and not entry.is_symlink():
            mount("/dev/null", str(entry), None, MS_BIND)
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    scratch = f"mode=1777,size={scratch_mb}m,nr_inodes={scratch_mb * 256}"
    closed = {str(closed_ancestor(Path(folder))) for folder in closed_folders()}
    cover([*hidden, *closed], {SCRATCH: scratch}, python_folders(left_out=[] if (own := checkout()) is None else [own]))
    for name, handle in devices.items():
        Path("/dev", name).touch()
        _show(handle, f"/dev/{name}")
    Path("/dev/fd").symlink_to("/proc/self/fd")
    Path("/dev/ptmx").symlink_to("pts/ptmx")  # `!command` in a cell runs in a terminal
    Path("/dev/pts").mkdir()
    mount(
        "devpts",
        "/dev/pts",
        "devpts",
        MS_NOSUID | MS_NOEXEC,
        f"newinstance,ptmxmode=0666,mode=0620,max={MAX_TERMINALS}",
    )
    for place in ALSO_SCRATCH:
        Path(place).mkdir(parents=True)
    _make_read_only()
    mount(None, SCRATCH, None, MS_BIND | MS_REMOUNT | MS_NOSUID | MS_NODEV)
    for place in ALSO_SCRATCH:
        mount(SCRATCH, place, None, MS_BIND)


def cover(places: list[str], options: dict[str, str], needed: list[str]) -> None:
    """Mounts an empty folder over each place and makes the needed folders inside them visible again.

    Args:
        places: Folders to hide.
        options: Mount options by folder.
        needed: Folders that stay visible.
    """
    outermost = sorted(place for place in set(places) if not any(_is_inside(place, other) for other in places))
    shown = [folder for folder in needed if any(folder == place or _is_inside(folder, place) for place in outermost)]
    handles = {folder: os.open(folder, os.O_PATH) for folder in shown}  # before they are hidden
    for place in outermost:
        mount("tmpfs", place, "tmpfs", MS_NOSUID, options.get(place, "mode=755,size=1m"))
    for folder, handle in handles.items():
        Path(folder).mkdir(parents=True, exist_ok=True)
        _show(handle, folder)


def closed_folders() -> list[str]:
    """Folders with modules of this Python that an unprivileged user cannot enter."""
    return [folder for folder in python_folders() if closed_ancestor(Path(folder)) is not None]


def python_folders(left_out: Sequence[Path] = ()) -> list[str]:
    """Folders with the modules of this Python.

    Args:
        left_out: Folders of the search path that are not needed once the modules of this package are loaded.
    """
    modules = [os.path.abspath(path) for path in sys.path if os.path.isdir(path) and Path(path) not in left_out]
    places = [sys.base_prefix, sys.prefix, *modules]
    return [place for place in dict.fromkeys(places) if not any(_is_inside(place, other) for other in places)]


def checkout() -> Path | None:
    """The checkout that contains this module; None if the package is installed next to the other libraries.

    A checkout also contains data, runs and gold answers, which an interpreter must not see.
    """
    folder = Path(__file__).parents[3]
    return None if (folder / "IPython").is_dir() else folder


def mount(source: str | None, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    """The system call.

    Raises:
        OSError: The kernel refuses it.
    """
    words = [word.encode() if word is not None else None for word in (source, target, kind)]
    if LIBC.mount(*words, ctypes.c_ulong(flags), data.encode() if data is not None else None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount on {target}: {os.strerror(code)}")


def _show(handle: int, target: str) -> None:
    mount(f"/proc/self/fd/{handle}", target, None, MS_BIND | MS_REC)
    os.close(handle)


def _make_read_only() -> None:
    wanted = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    if LIBC.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, wanted, len(wanted)) != 0:
        raise OSError(ctypes.get_errno(), "the kernel cannot make all mounts read-only (Linux 5.12 can)")


def _is_inside(place: str, other: str) -> bool:
    return place.startswith(other.rstrip("/") + "/")  # with Path, this would dominate the start time of an interpreter


def closed_ancestor(folder: Path) -> Path | None:
    """The outermost folder among this one and its parents that other users may not enter. None if there is none."""
    for ancestor in [*reversed(folder.parents), folder]:
        if not ancestor.stat().st_mode & 0o001:
            return ancestor
    return None
