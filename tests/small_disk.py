"""Small, full or read-only file systems, mounted for one test."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

FILLER = ".filler"


@contextlib.contextmanager
def mounted(folder: Path, size: str = "4m") -> Iterator[Path]:
    """Mounts a tmpfs; the test is skipped if this user cannot mount one."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def make_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def fill(folder: Path, spare: int = 0) -> None:
    """Fills a disk except for a number of bytes, rounded up to whole pages."""
    state = os.statvfs(folder)
    with (folder / FILLER).open("ab", buffering=0) as stream:
        stream.write(bytes(max(state.f_bavail * state.f_bsize - spare, 0)))


def make_room(folder: Path) -> None:
    (folder / FILLER).unlink()
