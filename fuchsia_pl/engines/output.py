"""Redirection of an engine's own output to a file, during its start and afterwards."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def output_to(file: Path) -> Iterator[None]:
    """Sends standard output and error to a file. Processes started inside inherit it and keep it afterwards.

    It redirects file descriptors, since the output of an engine's processes and C++ parts bypasses Python's streams.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in enumerate(saved, start=1):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(log)


def tail(file: Path, num_lines: int = 15) -> str:
    """The last lines of a log, or a note that there is no output."""
    if not file.exists():
        return "(no output)"
    return "\n".join(file.read_text(errors="replace").splitlines()[-num_lines:]) or "(no output)"
