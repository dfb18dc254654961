"""A seccomp filter of system calls that an interpreter may not make. Linux on x86-64 and arm64; standard library only.

The filter refuses:
- Memory that is not counted: anonymous files (memfd), anonymous shared memory, System V and POSIX queues, pages that only a pipe
  holds (vmsplice). Scarce resources of the host: huge pages, contexts of asynchronous I/O (io_setup).
- New namespaces and mounts.
- Sockets other than IP: Unix sockets of the host and sockets of its hypervisor are reachable from any network namespace. A pair
  of connected sockets is allowed if neither can connect to another.
- Socket buffers larger than the supervisor counts.
- Calls that bypass a filter or a signal: io_uring, bpf, and a change of the signal that ends the process with its parent.
"""

import ctypes
import errno
import platform
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x45, 0x54, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in seccomp_data
AF_INET, AF_INET6 = 2, 10
CLONE_NEW = 0x7E020000
SHARED_ANONYMOUS, HUGE = 0x21, 0x40000
SOCK_STREAM, SOCK_SEQPACKET, SOCK_TYPES = 1, 5, 0xF
SO_SNDBUF, SO_SNDBUFFORCE = 7, 32
# Name -> number on x86-64 and on arm64.
DENIED = {
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "mount_setattr": (442, 442),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_setup": (206, 0), "vmsplice": (278, 75),
}  # fmt: skip
CLONE, CLONE3, SOCKET, SOCKETPAIR, SETSOCKOPT, MMAP, PRCTL = (
    (56, 220), (435, 435), (41, 198), (53, 199), (54, 208), (9, 222), (157, 167),
)  # fmt: skip
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
Step = tuple[int, int, int, int]  # code, steps to skip if true, steps to skip if false, constant


def program() -> list[Step]:
    """The filter of this machine.

    Raises:
        OSError: There is none for its processor.
    """
    machine = platform.machine()
    if machine not in AUDIT:
        raise OSError(errno.ENOSYS, f"there is no filter of system calls for {machine}")
    column = list(AUDIT).index(machine)
    refuse = (RETURN, 0, 0, ERRNO | errno.EPERM)
    steps: list[Step] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, AUDIT[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":  # call numbers of the 32-bit ABI (x32) have this bit
        steps += [(ANY_BIT, 0, 1, 0x40000000), refuse]
    for numbers in DENIED.values():
        steps += [(EQUAL, 0, 1, numbers[column]), refuse]
    # The flags of clone3 are in memory, which a filter cannot read. Libraries fall back to `clone`.
    steps += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, ERRNO | errno.ENOSYS)]
    checks: dict[int, list[Step]] = {
        CLONE[column]: [_argument(0), (ANY_BIT, 0, 1, CLONE_NEW), refuse],
        SOCKET[column]: [_argument(0), (EQUAL, 2, 0, AF_INET), (EQUAL, 1, 0, AF_INET6), refuse],
        SOCKETPAIR[column]: [
            _argument(1),
            (AND, 0, 0, SOCK_TYPES),
            (EQUAL, 2, 0, SOCK_STREAM),
            (EQUAL, 1, 0, SOCK_SEQPACKET),
            refuse,
        ],
        SETSOCKOPT[column]: [_argument(2), (EQUAL, 1, 0, SO_SNDBUF), (EQUAL, 0, 1, SO_SNDBUFFORCE), refuse],
        MMAP[column]: [
            _argument(3),
            (ANY_BIT, 2, 0, HUGE),
            (AND, 0, 0, SHARED_ANONYMOUS),
            (EQUAL, 0, 1, SHARED_ANONYMOUS),
            refuse,
        ],
        PRCTL[column]: [_argument(0), (EQUAL, 0, 1, PR_SET_PDEATHSIG), refuse],
    }
    for number, check in checks.items():
        steps += [(EQUAL, 0, len(check) + 1, number), *check, (RETURN, 0, 0, ALLOW)]
    return [*steps, (RETURN, 0, 0, ALLOW)]


def deny() -> None:
    """Applies the filter permanently to this thread and all that it starts.

    Raises:
        OSError: The system does not support such filters.
    """
    steps = program()
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    allowed = LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    if not allowed or LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the system takes no filter of system calls")


def _argument(position: int) -> Step:
    return (LOAD, 0, 0, ARGUMENTS + 8 * position)
