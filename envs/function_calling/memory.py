"""Memory of all processes of an interpreter, for the supervisor that enforces a limit. Standard library only."""

import contextlib
import os
import re

# Upper bound of the rate at which a process gets memory. It turns the memory that is left into a time until the next check.
MB_PER_S = 4096
PAUSES_S = (0.02, 0.25)
# Hundreds of interpreters may be idle at a time. The checks of one whose memory does not change become less frequent.
IDLE_PAUSE_S = 1.0
UNCHANGED_MB = 0.5
# Private anonymous memory, pages of the scratch folder, and swapped pages.
RESIDENT = re.compile(r"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB", re.M)
# The same, but a page that n processes share counts 1/n for each.
PROPORTIONAL = re.compile(r"^(?:Pss_Anon|Pss_Shmem|SwapPss):\s+(\d+) kB", re.M)
SOCKETS = re.compile(r"^sockets: used (\d+)", re.M)
# A full socket holds its buffer and one more message of at most half that size.
FULL_BUFFER = 1.5


def used_mb(proc: int, pids: list[int], limit_mb: int) -> float:
    """Memory of processes in MiB. Pages that forks share are counted once, but only if the cheaper sum exceeds the limit.

    Args:
        proc: A descriptor of the /proc of their namespace.
        pids: The processes.
        limit_mb: Up to this value the cheaper sum, which is an upper bound, is returned.
    """
    resident = {pid: _of_process(proc, pid, "status", RESIDENT) or 0.0 for pid in pids}
    if sum(resident.values()) <= limit_mb:
        return sum(resident.values())
    exact = {pid: _of_process(proc, pid, "smaps_rollup", PROPORTIONAL) for pid in pids}
    return sum(resident[pid] if found is None else found for pid, found in exact.items())


def socket_mb(proc: int, pids: list[int], buffer_bytes: int) -> float:
    """Upper bound in MiB of the data in all sockets of the processes' network namespace, including sockets in flight.

    Args:
        proc: A descriptor of the /proc of their namespace.
        pids: The processes.
        buffer_bytes: Buffer size of a socket.
    """
    found = (SOCKETS.search(_text(proc, f"{pid}/net/sockstat")) for pid in pids)
    count = next((int(match[1]) for match in found if match is not None), 0)
    return count * FULL_BUFFER * buffer_bytes / 2**20


def pause_s(left_mb: float, last_left_mb: float, last_pause_s: float) -> float:
    """Seconds until the next check.

    Args:
        left_mb: Memory left below the limit.
        last_left_mb: The same at the last check.
        last_pause_s: Pause before this check.

    >>> pause_s(1.0, 9.0, 0.0), pause_s(512.0, 9.0, 0.0), pause_s(1e6, 9.0, 0.0)
    (0.02, 0.125, 0.25)
    >>> pause_s(512.0, 512.1, 0.125), pause_s(512.0, 512.1, 0.8), pause_s(512.0, 520.0, 0.8)
    (0.25, 1.0, 0.125)
    """
    pause = min(max(left_mb / MB_PER_S, PAUSES_S[0]), PAUSES_S[1])
    if abs(left_mb - last_left_mb) < UNCHANGED_MB:
        return max(pause, min(2 * last_pause_s, IDLE_PAUSE_S))
    return pause


def processes(proc: int) -> list[int]:
    """All processes of a /proc."""
    return [int(name) for name in os.listdir(proc) if name.isdigit()]


def _of_process(proc: int, pid: int, name: str, pattern: re.Pattern[str]) -> float | None:
    """MiB of a process. If its first thread has ended, /proc shows the memory only under the ids of the other threads."""
    found = _sum(proc, f"{pid}/{name}", pattern)
    if found is None:
        sums = (_sum(proc, f"{thread}/{name}", pattern) for thread in _threads(proc, pid) if thread != pid)
        found = next((value for value in sums if value is not None), None)
    return found


def _threads(proc: int, pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        handle = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
        try:
            return [int(name) for name in os.listdir(handle)]
        finally:
            os.close(handle)
    return []


def _sum(proc: int, name: str, pattern: re.Pattern[str]) -> float | None:
    """Sum of the matching lines of a file, in MiB. None if no line matches or the file cannot be read."""
    found = pattern.findall(_text(proc, name))
    return sum(map(int, found)) / 1024 if found else None


def _text(proc: int, name: str) -> str:
    with contextlib.suppress(OSError):
        handle = os.open(name, os.O_RDONLY, dir_fd=proc)
        with open(handle, errors="replace") as file:
            return file.read()
    return ""
