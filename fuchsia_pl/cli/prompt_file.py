"""The file of `fuchsia predict --input`: JSON lines with prompts, conversations, or items of an environment."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fuchsia_pl.cli.launch import is_first_rank
from fuchsia_pl.envs.conversation import prompt_messages
from fuchsia_pl.envs.json_rows import JSON_SPACE, read_json
from fuchsia_pl.envs.rows import Rows
from fuchsia_pl.types import ConfigError, Item

STANDARD = "-"
ID = "id"
PROMPT_FIELDS = ("prompt", "messages")


class PromptRows(Rows):
    """Rows with a prompt or with messages as items of an environment whose prompt field is "prompt".

    Args:
        rows: The rows of the file.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Item:
        """The row with its conversation as the field "prompt"."""
        row = self._rows.row(index)
        field = next(field for field in PROMPT_FIELDS if row.get(field) is not None)
        return {"prompt": row[field]}

    def where(self, index: int) -> str:
        """File and line of the row."""
        return self._rows.where(index)


@dataclass(frozen=True)
class Prompts:
    """The rows of an input.

    Attributes:
        items: One item per row.
        ids: Id of each row: its field "id", or else its line, counted from 1.
        digest: Hash of the input.

    >>> Prompts([{"prompt": "2+2?"}], ["a"], "").ids
    ['a']
    """

    items: Sequence[Item]
    ids: Sequence[str | int]
    digest: str


def read_prompts(name: str, as_items: bool) -> Prompts:
    """Reads and checks a whole input, before anything is loaded.

    Args:
        name: Path of the file, "-" for standard input.
        as_items: Whether a row is an item of the config's environment.

    Raises:
        ConfigError: It cannot be read, has no rows, or a row cannot be used. The message has the line.
    """
    content = _content(name)
    lines = content.split(b"\n")
    file = "standard input" if name == STANDARD else name
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip(JSON_SPACE)]
    if not numbers:
        raise ConfigError(f'--input {name} has no rows: give JSON lines such as {{"prompt": "…"}}')
    if lines[numbers[0] - 1].strip(JSON_SPACE).startswith(b"["):
        raise ConfigError(f"--input {name} is a JSON array: give JSON lines, one object per line")
    rows = read_json(file, lines)
    if not as_items:
        for row, number in zip(rows, numbers, strict=True):
            _check_prompt(row, f"{file}, line {number}")
    return Prompts(
        rows if as_items else PromptRows(rows), _ids(file, rows, numbers), hashlib.sha256(content).hexdigest()
    )


def _content(name: str) -> bytes:
    if name != STANDARD:
        try:
            return Path(name).read_bytes()
        except OSError as error:
            raise ConfigError(f"--input {name} cannot be read: {error.strerror}") from error
    if not is_first_rank():
        raise ConfigError(
            f"--input {STANDARD} reads standard input, which only the first of several ranks has: give a file"
        )
    return sys.stdin.buffer.read()


def _check_prompt(row: Item, where: str) -> None:
    given = [field for field in PROMPT_FIELDS if row.get(field) is not None]
    if len(given) != 1:
        found = "both 'prompt' and 'messages'" if given else f"neither 'prompt' nor 'messages', it has {sorted(row)}"
        raise ConfigError(
            f'{where} has {found}: a row is {{"prompt": "…"}} or {{"messages": […]}}, with --as_items an item of the config\'s '
            "environment"
        )
    if given == ["messages"] and not isinstance(row["messages"], list):
        raise ConfigError(f'{where}: \'messages\' must be a list of messages {{"role": …, "content": …}}')
    try:
        prompt_messages(row, given[0])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _ids(file: str, rows: Rows, numbers: list[int]) -> list[str | int]:
    """The ids of the rows.

    Raises:
        ConfigError: One is neither a text nor a whole number, or two are equal.
    """
    line_of: dict[str | int, int] = {}
    for row, number in zip(rows, numbers, strict=True):
        row_id = row.get(ID, number)
        if isinstance(row_id, bool) or not isinstance(row_id, str | int):
            raise ConfigError(f"{file}, line {number}: its id is {row_id!r}: an id is a text or a whole number")
        if row_id in line_of:
            raise ConfigError(
                f"{file}, line {number}: its id {row_id!r} is that of line {line_of[row_id]} too (a row without an id has the "
                "number of its line): give each row its own"
            )
        line_of[row_id] = number
    return list(line_of)
