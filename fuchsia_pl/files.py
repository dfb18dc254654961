"""Writing to a disk that may be full: existing files stay intact, and the error is one line."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

from fuchsia_pl.types import ConfigError

RAM_BACKED = Path("/dev/shm")
# Libraries in Rust and C++ put the system's error number into the text of their errors.
SYSTEM_NUMBER = re.compile(r"\(os error (\d+)\)")
TORCH_WRITER = "iostream error"  # the whole message of torch for a file that it opened itself
BLOCK_BYTES = 1 << 16
RUN_ADVICE = "Make room there, or set another folder, and continue from the newest checkpoint with --ckpt_path last"


class DiskError(RuntimeError):
    """A file could not be written. The message contains the path, the reason and what to do."""


@contextlib.contextmanager
def writing(path: Path, advice: str = RUN_ADVICE) -> Iterator[None]:
    """Inside the `with` block, raises every failed write as DiskError, whichever library raised it.

    Args:
        path: The file or folder that is written, for the message.
        advice: What the user can do, for the message.

    Raises:
        DiskError: The disk is full, access is denied, or the folder does not exist.
        ConfigError: Raised in the block; it is passed on unchanged.
    """
    handled = sys.exception()  # an error that the caller is handling, which is not an error of this disk
    try:
        yield
    except (DiskError, ConfigError):
        raise
    except Exception as error:  # torch raises RuntimeError, safetensors its own subclass of Exception
        reason = _systems_reason(error, handled)
        if reason is None:
            raise
        raise DiskError(
            f"{path} cannot be written: {reason} ({free_bytes(path) / 1e6:.1f} MB are free there). Files written "
            f"before are intact. {advice}"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a new file, which replaces `path` when the `with` block ends without an error.

    Raises:
        DiskError: The new file could not be written. It is removed, and the older file is unchanged.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "a.txt")) as partial:
    ...         _ = partial.write_text("new")
    ...     [file.name for file in Path(folder).iterdir()]
    ['a.txt']
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def share_permissions(written: Path) -> None:
    """Gives all files of a folder the permissions of one of them. safetensors writes files that only their owner can read.

    Args:
        written: A file of the folder that was opened for writing, so that its permissions are those of the process.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (card, weights) = Path(folder, "README.md"), Path(folder, "model.safetensors")
    ...     _ = card.write_text("ours"), weights.write_bytes(b""), weights.chmod(0o600)
    ...     share_permissions(card)
    ...     weights.stat().st_mode == card.stat().st_mode
    True
    """
    mode = written.stat().st_mode
    for file in written.parent.iterdir():
        if file.is_file():
            file.chmod(mode)


def append_lines(path: Path, text: str) -> None:
    r"""Appends all of some lines to a file, or none. First removes an incomplete last line, which a killed process left.

    Args:
        path: The file, which is created if it does not exist.
        text: Lines, each with its line end. A lone surrogate, which UTF-8 cannot encode, is written as a JSON escape.

    Raises:
        DiskError: The lines could not be written. The file has the same lines as before.

    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = Path(file.name).write_text('{"n": 1}\n{"n"')
    ...     append_lines(Path(file.name), '{"n": 2}\n')
    ...     Path(file.name).read_text()
    '{"n": 1}\n{"n": 2}\n'
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as stream:
            _lock(stream)
            length = _cut_torn_line(stream)
            rest = memoryview(text.encode(errors="backslashreplace"))
            try:
                while rest:
                    rest = rest[stream.write(rest) :]
            except OSError:
                stream.truncate(length)
                raise


def mend_lines(paths: Iterable[Path]) -> None:
    """Removes the incomplete last line of files that `append_lines` wrote in a run that was killed.

    Files that another process is writing, or that cannot be written, are not changed.
    """
    for path in paths:
        with contextlib.suppress(OSError), path.open("r+b", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _cut_torn_line(stream)


def free_bytes(path: Path) -> int:
    """Free bytes on the file system of a path, or of its nearest parent folder that exists."""
    folder = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(folder).free


def roomy_folder(needed: int, setting: str) -> Path:
    """The folder for short-lived files: the RAM-backed one if they fit in it, else the one for temporary files.

    Args:
        needed: Size of the files in bytes.
        setting: The setting that determines the size, for the message.

    Raises:
        ConfigError: The files fit in neither folder.
    """
    folders = [RAM_BACKED] if RAM_BACKED.is_dir() and os.access(RAM_BACKED, os.W_OK) else []
    folders.append(Path(tempfile.gettempdir()))
    for folder in folders:
        if free_bytes(folder) >= needed:
            return folder
    free = ", ".join(f"{free_bytes(folder) / 1e6:.1f} MB are free in {folder}" for folder in folders)
    raise ConfigError(
        f"{setting} needs {needed / 1e6:.1f} MB for short-lived files, and {free}: make room in one of them, or set the variable "
        "TMPDIR to a folder that has it"
    )


def _lock(stream: FileIO) -> None:
    """Locks a file against `mend_lines` of another process; waits for at most one second."""
    for _ in range(100):
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # not every file system has locks
            return
        else:
            return


def _cut_torn_line(stream: FileIO) -> int:
    """Truncates a file after its last line end, and returns the new length in bytes."""
    length = end = stream.seek(0, os.SEEK_END)
    while end > 0:
        start = max(end - BLOCK_BYTES, 0)
        found = os.pread(stream.fileno(), end - start, start).rfind(b"\n")
        end = start
        if found >= 0:
            end = start + found + 1
            break
    if end < length:
        stream.truncate(end)
    return end


def _systems_reason(error: BaseException, handled: BaseException | None) -> str | None:
    """The operating system's message for a failed write, or None for an error with another cause.

    Args:
        error: The error that was raised.
        handled: The error that the caller was already handling. It may be the context of `error`, but not its cause.
    """
    cause: BaseException | None = error
    while cause is not None and cause is not handled:
        if isinstance(cause, OSError) and cause.errno is not None:
            return os.strerror(cause.errno)
        if TORCH_WRITER in str(cause):
            return os.strerror(errno.EIO)
        number = SYSTEM_NUMBER.search(str(cause))
        if number:
            return os.strerror(int(number[1]))
        cause = cause.__cause__ if cause.__suppress_context__ else cause.__context__
    return None
