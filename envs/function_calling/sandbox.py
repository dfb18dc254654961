"""What an interpreter may not do. Linux only; standard library only, since it runs in a process that forks.

Covered, everywhere:
- Time: the server ends an interpreter whose cell takes too long; CPU seconds are limited as a backstop.
- Memory: address space of each process, and what all of them use together: a supervisor looks every 0.02 to 0.25 s and ends them
  above the limit. Core dumps are off. Size of each file. Open files.
- Output: what a cell prints is cut at a limit, and the cell ended there.
- Processes: all that a cell starts end with the interpreter, and the interpreter with the server, however that ends.
- Results: a cell may write to its own channel; that is text like what it prints, and gives no status but ok and error (wire.py).

Covered where the system lets this process make namespaces and mounts (as root, or as a user where user namespaces are allowed):
- Network: there is none, loopback included.
- Other processes: none of them can be seen or signalled.
- Files: all is read-only but /tmp (also seen as /dev/shm and /var/tmp), which is empty at first, bounded as a whole, and gone
  afterwards. Of the rest it sees the system's folders and Python's; no home, no data, no checkout of this project, no device but
  null, full, random and a bounded number of terminals.
- Number of processes. Memory of sockets, as if all were full.
- Rights: it has none, and gets none by programs that run as root. As root, it runs as a user of its own.

Covered where the kernel takes a filter of system calls, see syscalls.py:
- New namespaces and mounts cannot be made inside.
- Memory that no process maps (memfd, shared memory, queues, pages in pipes) cannot be had, nor large buffers of sockets.
- Sockets of a host (Unix) and of its hypervisor cannot be reached.

Where any of this is missing, the server names it and does not start, unless it is run with --allow-weak-sandbox.

Not covered: reading files in the system's and Python's folders that everyone may read (as a user: that this user may read);
memory that a burst takes between two looks of the supervisor; what the kernel keeps of pipes, maps and file locks; CPU time of
other cores; bugs in the kernel. It stops accidents and a policy's clumsy experiments. It is no place for code of somebody who
wants to break out: for that, run the server in a virtual machine and name it by URL.
"""

import contextlib
import ctypes
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from envs.function_calling import mounts, syscalls

CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
CAPABILITY_VERSION = 0x20080522
TRIAL_MB = 8
STATE, PARENT, NUM_THREADS = 0, 1, 17  # fields of /proc/PID/stat after the name
# As root, interpreters get users of their own from here on, so that none may touch another's files or processes.
LOWEST_UID = 600_000
UIDS_PER_SERVER = 1000
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Limits:
    """Of one interpreter.

    Attributes:
        memory_mb: Address space of each of its processes, and memory of all of them, in MiB.
        file_mb: Size of each file and of all that it writes, in MiB.
        cpu_s: CPU seconds of each process over its whole life.
        num_processes: Processes at a time, where they can be told from those of others.
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
            resource.RLIMIT_CORE: 1,  # too little for a file, as 0 is; with 0 a handler of the host's would run
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


@dataclass(frozen=True)
class Offer:
    """What the system lets this process do for a sandbox.

    Attributes:
        is_apart: Namespaces of its own.
        hides_files: Mounts of its own.
        is_filtered: A filter of system calls.
        gives_up_rights: The end of its rights; as root, by becoming another user.
    """

    is_apart: bool
    hides_files: bool
    is_filtered: bool
    gives_up_rights: bool

    def missing(self) -> list[str]:
        """What is not covered.

        >>> Offer(is_apart=True, hides_files=True, is_filtered=False, gives_up_rights=True).missing()
        ['new namespaces, memory that no process maps']
        """
        gaps = {
            "network, other processes": self.is_apart,
            "number of processes": self.is_apart or os.getuid() == 0,
            "files of the host, the size of all that it writes, memory of sockets": self.hides_files,
            "new namespaces, memory that no process maps": self.is_filtered,
        }
        return [gap for gap, is_covered in gaps.items() if not is_covered]


def find_offer() -> Offer:
    """Tries everything, in processes that end at once."""
    is_apart = _works(leave_namespaces)
    hides_files = is_apart and _works(leave_namespaces, lambda: _works(lambda: mounts.hide_files(TRIAL_MB)))
    gives_up_rights = _works(lambda: become(first_uid(os.getpid())))
    return Offer(is_apart, hides_files, _works(syscalls.deny), gives_up_rights)


def first_uid(server_pid: int) -> int:
    """The first of the users that a server's interpreters become."""
    return LOWEST_UID + server_pid * UIDS_PER_SERVER


def leave_namespaces() -> None:
    """Takes network and the sight of other processes away from the processes that this one will start.

    Raises:
        OSError: The system does not allow it.
    """
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC
    if LIBC.unshare(flags if uid == 0 else flags | CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "the system allows no namespaces of one's own")
    if uid != 0:  # it keeps its numbers; without them it could not own a file
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def become(uid: int) -> None:
    """Gives up all rights for good; as root, becomes this user."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    else:
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
        if LIBC.capset(header, (ctypes.c_uint32 * 6)()) != 0:
            raise OSError(ctypes.get_errno(), "the rights in the user namespace cannot be given up")
    LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def end_descendants() -> None:
    """Ends all descendants of this process, which must have adopted its orphans, in a bounded number of rounds."""
    for _ in range(1000):
        found = descendants(os.getpid())
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


def _works(*steps: Callable[[], object]) -> bool:
    """Whether steps raise nothing in a process that ends after them."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(OSError):
            code = 0 if all(step() is not False for step in steps) else 1
        os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def descendants(pid: int) -> list[int]:
    """All processes below one that have not ended."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:  # it has ended
                continue
            fields = stat.rpartition(")")[2].split()
            if fields[STATE] != "Z" or int(fields[NUM_THREADS]) > 1:  # its first thread may end before the others
                parents[int(entry)] = int(fields[PARENT])
    found, fresh = set[int](), {pid}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return sorted(found)
