"""Restrictions of an interpreter. Linux only. Standard library only, because this code runs in a process that forks.

Covered on every system:
- Time: the server ends an interpreter whose cell exceeds the time limit. A limit on CPU seconds is the backstop.
- Memory: the address space of each process, and the memory of all of them together. A supervisor checks it every 0.02 to 0.25 s
  (less often while it does not change) and ends the processes above the limit. Size of each file. Open files. No core dumps.
- Output: the output of a cell is cut at a limit, and the cell ends there.
- Processes: all processes that a cell starts end with the interpreter. The interpreter ends with the server, for any reason.
- Results: a cell may write to its own channel. The server reads this as output, with no status except ok and error (wire.py).

Covered if the system allows namespaces and mounts (as root, or as a user with user namespaces):
- Network: none, not even loopback.
- Other processes: the interpreter can neither see nor signal them.
- Files: all is read-only except /tmp (the same folder as /dev/shm and /var/tmp). It is empty at first, limited in total size, and
  removed afterwards. Other visible folders are those of the system and of Python: no home, no data, no checkout of this project.
  Devices are null, full, random, urandom and a limited number of terminals.
- Number of processes. Memory of sockets, counted as if all were full.
- Privileges: none, also not through set-user-ID programs. If the server is root, each interpreter has its own user.

Covered if the kernel supports seccomp filters, see syscalls.py:
- New namespaces and mounts inside the sandbox are refused.
- Memory that no process maps (memfd, shared memory, queues, pages in pipes) and large socket buffers are refused.
- Unix sockets of the host and sockets of its hypervisor are not reachable.

If any of this is missing, the server lists it and does not start, unless it has the option --allow-weak-sandbox.

Not covered: reading world-readable files in the folders of the system and of Python (as a user: all that this user may read);
memory that a burst takes between two checks of the supervisor; kernel memory of pipes, maps and file locks; CPU time of other
cores; bugs in the kernel. The sandbox stops accidents and clumsy experiments of a policy. It is not made for code that is written
to break out of it: for that, run the server in a virtual machine and give its URL.
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

from fuchsia_pl.library.function_calling import mounts, syscalls

CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
CAPABILITY_VERSION = 0x20080522
TRIAL_MB = 8
STATE, PARENT, NUM_THREADS = 0, 1, 17  # indices of fields of /proc/PID/stat after the name
# If the server is root, each interpreter gets a user id from here on: none has access to the files or processes of another.
LOWEST_UID = 600_000
UIDS_PER_SERVER = 1000
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Limits:
    """Limits of one interpreter.

    Attributes:
        memory_mb: Address space of each of its processes, and memory of all of them together, in MiB.
        file_mb: Size of each file, and of all written files together, in MiB.
        cpu_s: CPU seconds of each process over its lifetime.
        num_processes: Number of concurrent processes, if they have a separate user or namespace.
        num_files: Open files of each process.
    """

    memory_mb: int = 1024
    file_mb: int = 16
    cpu_s: int = 120
    num_processes: int = 24
    num_files: int = 128

    def apply(self) -> None:
        """Sets the limits of this process and of all that it starts."""
        megabyte = 2**20
        for kind, value in {
            resource.RLIMIT_AS: self.memory_mb * megabyte,
            resource.RLIMIT_FSIZE: self.file_mb * megabyte,
            resource.RLIMIT_CPU: self.cpu_s,
            resource.RLIMIT_NOFILE: self.num_files,
            resource.RLIMIT_CORE: 1,  # too little for a file, like 0; with 0 the host's core dump handler would run
        }.items():
            resource.setrlimit(kind, (value, value))

    def apply_to_user(self) -> None:
        """Limits the number of processes of the user that this process will become. No other process may have that user."""
        resource.setrlimit(resource.RLIMIT_NPROC, (self.num_processes, self.num_processes))


def die_with_parent(how: signal.Signals) -> None:
    """Requests a signal from the kernel when the parent of this process ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, how)


def adopt_orphans() -> None:
    """Makes this process the parent of all descendants whose own parents end."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)


@dataclass(frozen=True)
class Offer:
    """Parts of the sandbox that the system supports.

    Attributes:
        is_apart: Separate namespaces.
        hides_files: Separate mounts.
        is_filtered: A filter of system calls.
        gives_up_rights: Dropping of all privileges; as root, by a change of the user.
    """

    is_apart: bool
    hides_files: bool
    is_filtered: bool
    gives_up_rights: bool

    def missing(self) -> list[str]:
        """The parts that are not covered.

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
    """Tries each part in a short-lived process."""
    is_apart = _works(leave_namespaces)
    hides_files = is_apart and _works(leave_namespaces, lambda: _works(lambda: mounts.hide_files(TRIAL_MB)))
    gives_up_rights = _works(lambda: become(first_uid(os.getpid())))
    return Offer(is_apart, hides_files, _works(syscalls.deny), gives_up_rights)


def first_uid(server_pid: int) -> int:
    """The first user id of a server's interpreters."""
    return LOWEST_UID + server_pid * UIDS_PER_SERVER


def leave_namespaces() -> None:
    """Puts the processes that this one will start into new namespaces of network, processes and IPC.

    Raises:
        OSError: The system does not allow it.
    """
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC
    if LIBC.unshare(flags if uid == 0 else flags | CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "the system allows no namespaces of one's own")
    if uid != 0:  # its ids stay the same; without a mapping it could not own a file
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def become(uid: int) -> None:
    """Drops all privileges permanently; as root, by a change to this user."""
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
    """Kills all descendants of this process, in a bounded number of rounds. `adopt_orphans` must have been called before."""
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
    """Whether the steps succeed in a forked process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(OSError):
            code = 0 if all(step() is not False for step in steps) else 1
        os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def descendants(pid: int) -> list[int]:
    """All running processes below one."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:  # it has ended
                continue
            fields = stat.rpartition(")")[2].split()
            if fields[STATE] != "Z" or int(fields[NUM_THREADS]) > 1:  # the first thread may end before the others
                parents[int(entry)] = int(fields[PARENT])
    found, fresh = set[int](), {pid}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return sorted(found)
