"""The file of `fuchsia predict --output`: a line per row, which a later call of the same command continues."""

import fcntl
import hashlib
import json
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, TextIO

from fuchsia_pl.files import append_lines, replacing
from fuchsia_pl.types import ConfigError

SETTINGS_SUFFIX = ".settings.json"
# Kept from the first call, and not compared.
STARTED_AT = "started_at"
REMEDY = "Give the same settings, or another --output"
NOT_WEIGHTS = (".md",)


class AnswerFile:
    """An output with the settings that its answers depend on, in a second file beside it.

    Args:
        path: The output. The file of settings has `SETTINGS_SUFFIX` after its name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_path = path.with_name(path.name + SETTINGS_SUFFIX)
        self.num_done = self.num_written = 0
        self._lock: BufferedReader | None = None

    def check(self, settings: Mapping[str, Any], ids: Sequence[str | int]) -> dict[str, Any]:
        """Counts the answers of an earlier call in `num_done`.

        Args:
            settings: What the answers depend on, as JSON.
            ids: Ids of the rows.

        Returns:
            The settings of the earlier call, or else the given ones.

        Raises:
            ConfigError: The file has answers of other settings or rows, or is no file of answers.
        """
        if self.path.exists() and not self.path.is_file():
            raise ConfigError(
                f"--output {self.path} is not a regular file: give another path, or - for standard output"
            )
        if not self.settings_path.exists():
            if self.path.exists() and self.path.stat().st_size:
                raise ConfigError(
                    f"--output {self.path} exists, and {self.settings_path.name} is not beside it: give another path, or "
                    "remove it"
                )
            return dict(settings)
        earlier = self._earlier()
        names = sorted({*earlier, *settings} - {STARTED_AT})
        changed = [_change(name, earlier, settings) for name in names if earlier.get(name) != settings.get(name)]
        if changed:
            raise ConfigError(f"--output {self.path} was begun with other settings: {'; '.join(changed)}. {REMEDY}")
        self.num_done = self._count(ids)
        return earlier

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings before the first answer, and keeps other processes from writing the same file.

        Raises:
            ConfigError: Another process writes it.
            DiskError: It cannot be written.
        """
        if not self.settings_path.exists():
            with replacing(self.settings_path) as partial:
                partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        append_lines(self.path, "")  # removes an incomplete last line
        self._lock = self.settings_path.open("rb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.end()
            raise ConfigError(f"--output {self.path} is being written by another process: wait for it") from error
        except OSError:  # not every file system has locks
            pass

    def write(self, lines: str) -> None:
        """Appends lines."""
        append_lines(self.path, lines)
        self.num_written += lines.count("\n")

    def end(self) -> None:
        """Lets other processes write the file."""
        if self._lock is not None:
            self._lock.close()

    def _earlier(self) -> dict[str, Any]:
        try:
            found = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.settings_path} cannot be read ({error}): remove it and {self.path}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{self.settings_path} has no settings: remove it and {self.path}")
        return found

    def _count(self, ids: Sequence[str | int]) -> int:
        """The number of whole lines, which must have the first ids in order."""
        if not self.path.exists():
            return 0
        number = 0
        with self.path.open("rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # a killed process left it; the next line replaces it
                if number == len(ids) or _id_of(line) != ids[number]:
                    raise ConfigError(
                        f"{self.path}, line {number + 1} is not the answer to row {number + 1} of the input: the file was "
                        "changed. Give another --output"
                    )
                number += 1
        return number


class StandardOutput:
    """Writes answers to standard output, where nothing can be continued.

    Args:
        stream: The stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.num_done = self.num_written = 0

    def write(self, lines: str) -> None:
        """Writes lines at once. A lone surrogate, which UTF-8 cannot encode, is written as a JSON escape."""
        self._stream.write(lines.encode(errors="backslashreplace").decode())
        self._stream.flush()
        self.num_written += lines.count("\n")

    def end(self) -> None:
        """Does nothing: the stream belongs to the process."""


def weights_digest(path: Path) -> str:
    """Hash of the files of an adapter or of a checkpoint."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    whole = hashlib.sha256()
    for file in files:
        if file.suffix not in NOT_WEIGHTS:
            with file.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def _id_of(line: bytes) -> Any:
    try:
        return json.loads(line)["id"]
    except (ValueError, KeyError, TypeError):
        return None


def _change(name: str, earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """A setting that differs, with its values if they are short.

    >>> _change("samples", {"samples": 1}, {"samples": 4}), _change("input", {"input": "a" * 64}, {"input": "b" * 64})
    ('samples was 1 and is 4', 'input differs')
    """
    was, now = (json.dumps(values.get(name), ensure_ascii=False) for values in (earlier, settings))
    return f"{name} was {was} and is {now}" if max(len(was), len(now)) < 64 else f"{name} differs"
