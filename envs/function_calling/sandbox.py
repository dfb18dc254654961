"""What an interpreter may not do. Linux only; standard library only, since it runs in a process that forks.

Covered, everywhere:
- Time: the server ends an interpreter whose cell takes too long; CPU seconds are limited as a backstop.
- Memory: address space of each process. Core dumps are off. Size of each file. Open files.
- Output: what a cell prints is cut at a limit, and the cell ended there.
- Processes: all that a cell starts end with the interpreter, and the interpreter with the server, however that ends.

Covered where the system lets this process make namespaces (as root, or as a user where user namespaces are allowed):
- Network: there is none, loopback included.
- Other processes: none of them can be seen or signalled.

Covered where the server runs as root:
- Files: an interpreter runs as a user of its own and writes only to its folder; with namespaces also: folders that only root may
  enter are hidden, and /tmp and /dev/shm are private and small.
- Number of processes.

Not covered: reading files that everyone may read; without root, reading and writing the files of the user who runs it, and
the number of processes within the time limit; bugs in the kernel. It stops accidents and a policy's clumsy experiments. It is no
place for code of somebody who wants to break out: for that, run the server in a virtual machine and name it by URL.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Limits:
    """Of one interpreter.

    Attributes:
        memory_mb: Address space of each of its processes, in MiB.
        file_mb: Size of each file and of its /tmp, in MiB.
        cpu_s: CPU seconds of each process over its whole life.
        num_processes: Processes at a time, where it runs as a user of its own.
        num_files: Open files of each process.
    """

    memory_mb: int = 1024
    file_mb: int = 16
    cpu_s: int = 120
    num_processes: int = 24
    num_files: int = 128

    def apply(self) -> None:
        """Sets them for this process and all that it starts."""
        megabyte = 2**20
        for kind, value in {
            resource.RLIMIT_AS: self.memory_mb * megabyte,
            resource.RLIMIT_FSIZE: self.file_mb * megabyte,
            resource.RLIMIT_CPU: self.cpu_s,
            resource.RLIMIT_NOFILE: self.num_files,
            resource.RLIMIT_CORE: 0,
        }.items():
            resource.setrlimit(kind, (value, value))

    def apply_to_user(self) -> None:
        """Limits the number of processes of the user that this process is about to become, who must be nobody else's."""
        resource.setrlimit(resource.RLIMIT_NPROC, (self.num_processes, self.num_processes))


def die_with_parent(how: signal.Signals) -> None:
    """Has the kernel send this process a signal when its parent ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, how)


def adopt_orphans() -> None:
    """Makes this process the parent of all descendants whose own parents end."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)


def leave_namespaces() -> bool:
    """Takes network and the sight of other processes away from the processes that this one will start.

    Returns:
        Whether the system allowed it.
    """
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC
    return LIBC.unshare(flags if os.getuid() == 0 else flags | CLONE_NEWUSER) == 0


def can_leave_namespaces() -> bool:
    """Whether `leave_namespaces` and, as root, `hide_files` will work, tried by a process that ends at once."""
    pid = os.fork()
    if pid == 0:
        works = leave_namespaces() and (os.getuid() != 0 or LIBC.unshare(CLONE_NEWNS) == 0)
        os._exit(0 if works else 1)
    return os.waitpid(pid, 0)[1] == 0


def closed_folders() -> list[str]:
    """Folders with this interpreter's modules that a user without rights could not enter."""
    return [folder for folder in python_folders() if _closed_ancestor(Path(folder)) is not None]


def hide_files(file_mb: int) -> None:
    """Gives this process, which must be root in namespaces of its own, a private /tmp and hides what only root may enter.

    Folders with this interpreter's modules that lie in a hidden one are shown again, read-only. Its mounts become its own: in
    its /proc are the numbers of its own namespace, by which its supervisor would end strangers.

    Raises:
        OSError: The kernel refuses a mount.
    """
    if LIBC.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "the system allows no mounts of one's own")
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("proc", "/proc", "proc")
    scratch = ("/tmp", "/dev/shm")
    closed = sorted({str(_closed_ancestor(Path(folder))) for folder in closed_folders()})
    # Opened before anything is hidden, so that they can be shown again.
    shown = [
        (Path(folder), os.open(folder, os.O_PATH))
        for folder in python_folders()
        if any(Path(folder).is_relative_to(place) for place in (*closed, *scratch))
    ]
    for place in closed:
        _mount("tmpfs", place, "tmpfs", data="mode=755,size=1m")
    for place in scratch:
        _mount("tmpfs", place, "tmpfs", data=f"mode=1777,size={file_mb}m")
    for folder, handle in shown:
        folder.mkdir(parents=True, exist_ok=True)
        _mount(f"/proc/self/fd/{handle}", str(folder), None, MS_BIND | MS_REC)
        _mount(None, str(folder), None, MS_BIND | MS_REMOUNT | MS_RDONLY)
        os.close(handle)


def become(uid: int) -> None:
    """Becomes a user without any rights, for good."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def end_descendants() -> None:
    """Ends all descendants of this process, which must have adopted its orphans, in a bounded number of rounds."""
    for _ in range(1000):
        found = _descendants(os.getpid())
        if not found:
            return
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.001)


def python_folders() -> list[str]:
    """Where this interpreter's modules lie."""
    places = [sys.base_prefix, sys.prefix, *(path for path in sys.path if os.path.isdir(path))]
    return [place for place in dict.fromkeys(places) if not any(_is_inside(place, other) for other in places)]


def _is_inside(place: str, other: str) -> bool:
    return place != other and Path(place).is_relative_to(other)


def _closed_ancestor(folder: Path) -> Path | None:
    """The outermost folder above this one, or itself, that only its owner may enter."""
    for ancestor in [*reversed(folder.parents), folder]:
        if not ancestor.stat().st_mode & 0o001:
            return ancestor
    return None


def _descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:  # it has ended
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(entry)] = int(parent)
    found, fresh = set[int](), {pid}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return sorted(found)


def _mount(source: str | None, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    words = [word.encode() if word is not None else None for word in (source, target, kind)]
    if LIBC.mount(*words, ctypes.c_ulong(flags), data.encode() if data is not None else None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount on {target}: {os.strerror(code)}")
