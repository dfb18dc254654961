"""Where an engine's own output goes while it starts and afterwards."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def output_to(file: Path) -> Iterator[None]:
    """Sends standard output and error to a file. Processes started inside inherit it and keep it afterwards.

    It works on file descriptors, since what an engine's processes and C++ parts print passes no Python stream.
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
    """The last lines of a log, or a word that there is none."""
    if not file.exists():
        return "(no output)"
    return "\n".join(file.read_text(errors="replace").splitlines()[-num_lines:]) or "(no output)"
