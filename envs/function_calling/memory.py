"""What all processes of an interpreter use together, for a supervisor that ends them above a limit. Standard library only."""

import contextlib
import os
import re

# A process gets memory no faster than this, so that what is left tells how long nobody need look.
MB_PER_S = 4096
PAUSES_S = (0.02, 0.25)
# Private and nameless memory, pages of the scratch folder, and what was swapped out.
RESIDENT = re.compile(r"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB", re.M)
# The same, where a page that n processes share counts 1/n for each.
PROPORTIONAL = re.compile(r"^(?:Pss_Anon|Pss_Shmem|SwapPss):\s+(\d+) kB", re.M)


def used_mb(proc: int, pids: list[int], limit_mb: int) -> float:
    """Memory of processes in MiB. What forks share is counted once, but only where the cheaper sum is above the limit.

    Args:
        proc: A descriptor of the /proc that has their numbers.
        pids: The processes.
        limit_mb: Below it the cheaper sum is good enough.
    """
    resident = {pid: _sum(proc, f"{pid}/status", RESIDENT) or 0.0 for pid in pids}
    if sum(resident.values()) <= limit_mb:
        return sum(resident.values())
    exact = {pid: _sum(proc, f"{pid}/smaps_rollup", PROPORTIONAL) for pid in pids}
    return sum(resident[pid] if found is None else found for pid, found in exact.items())


def pause_s(left_mb: float) -> float:
    """How long nobody need look.

    >>> pause_s(1.0), pause_s(512.0), pause_s(1e6)
    (0.02, 0.125, 0.25)
    """
    return min(max(left_mb / MB_PER_S, PAUSES_S[0]), PAUSES_S[1])


def processes(proc: int) -> list[int]:
    """All processes in a /proc."""
    return [int(name) for name in os.listdir(proc) if name.isdigit()]


def _sum(proc: int, name: str, pattern: re.Pattern[str]) -> float | None:
    """MiB of a file's lines, None where it cannot be read: the process has ended, or hides it."""
    with contextlib.suppress(OSError):
        handle = os.open(name, os.O_RDONLY, dir_fd=proc)
        with open(handle) as file:
            found = pattern.findall(file.read())
        return sum(map(int, found)) / 1024 if found else None
    return None
