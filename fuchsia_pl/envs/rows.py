"""Rows of files, each with its place in the file for messages."""

import bisect
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, overload

from fuchsia_pl.types import ConfigError, Item


class Rows(Sequence[Item]):
    """Rows in file order. Each access creates a new row, so changes by user code are not kept."""

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        """A row, or a list of rows.

        Raises:
            IndexError: There is no such row.
            ConfigError: The row cannot be converted to Python's types.
        """
        if isinstance(index, slice):
            return [self.row(position) for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} rows, got the index {index}")
        return self.row(index % len(self))

    @abstractmethod
    def row(self, index: int) -> Item:
        """The row at an index from 0 to `len(self) - 1`."""

    @abstractmethod
    def where(self, index: int) -> str:
        """The file of a row and its line or number in the file, counted from 1."""


class DictRows(Rows):
    """Rows stored as dicts.

    Args:
        file: Name of their file.
        rows: The rows.
        lines: First line of each row, counted from 1.

    >>> rows = DictRows("a.csv", [{"n": "1"}, {"n": "2"}], [2, 3])
    >>> rows[-1], len(rows), rows.where(0)
    ({'n': '2'}, 2, 'a.csv, line 2')
    """

    def __init__(self, file: str, rows: Sequence[dict[str, Any]], lines: Sequence[int]) -> None:
        self._file, self._rows, self._lines = file, rows, lines

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Item:
        """A copy of the row."""
        return dict(self._rows[index])

    def where(self, index: int) -> str:
        """File and line of the row."""
        return f"{self._file}, line {self._lines[index]}"


class JSONRows(Rows):
    """Rows stored as JSON text, which takes less memory than decoded values. Each access decodes a row.

    Args:
        file: Name of their file.
        texts: JSON objects in UTF-8 that have been decoded once without an error.
        places: Place of each row in the file.

    >>> JSONRows("a.jsonl", [b'{"n": 12345678901234567890}'], ["line 1"])[0]
    {'n': 12345678901234567890}
    """

    def __init__(self, file: str, texts: Sequence[bytes], places: Sequence[str]) -> None:
        self._file, self._texts, self._places = file, texts, places

    def __len__(self) -> int:
        return len(self._texts)

    def row(self, index: int) -> Item:
        """The row, decoded."""
        row: dict[str, Any] = json.loads(self._texts[index])
        return row

    def where(self, index: int) -> str:
        """File and place of the row."""
        return f"{self._file}, {self._places[index]}"


class JoinedRows(Rows):
    """The rows of several files, concatenated.

    Args:
        parts: The rows of each file.

    >>> joined = JoinedRows([DictRows("a.csv", [{"n": "1"}], [2]), DictRows("b.csv", [{"n": "2"}], [2])])
    >>> joined[1], joined.where(1)
    ({'n': '2'}, 'b.csv, line 2')
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, index: int) -> Item:
        """The row, read from its file."""
        part, position = self._at(index)
        return part.row(position)

    def where(self, index: int) -> str:
        """File and place of the row."""
        part, position = self._at(index)
        return part.where(position)

    def _at(self, index: int) -> tuple[Rows, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)


class SomeRows(Rows):
    """A range of some rows, with their places in the file.

    Args:
        rows: All rows.
        chosen: Positions of the chosen ones.

    >>> last = SomeRows(DictRows("a.csv", [{"n": "1"}, {"n": "2"}], [2, 3]), range(1, 2))
    >>> list(last), last.where(0)
    ([{'n': '2'}], 'a.csv, line 3')
    """

    def __init__(self, rows: Rows, chosen: range) -> None:
        self._rows, self._chosen = rows, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def row(self, index: int) -> Item:
        """The row at this position of the range."""
        return self._rows.row(self._chosen[index])

    def where(self, index: int) -> str:
        """File and place of the row."""
        return self._rows.where(self._chosen[index])


def first_rows(items: Sequence[Item], count: int) -> Sequence[Item]:
    """The first items of a split. Rows of a file keep their places, so that messages can name the line.

    Args:
        items: The split: rows of files, or a dataset of the hub (a slice of a dataset is not a list of rows).
        count: Maximum number of items.

    >>> first_rows([{"n": 1}, {"n": 2}], 1)
    [{'n': 1}]
    """
    return _some_rows(items, range(min(count, len(items))))


def rows_after(items: Sequence[Item], count: int) -> Sequence[Item]:
    """The items of a split after the first ones, with their places; see `first_rows`.

    >>> rows_after([{"n": 1}, {"n": 2}], 1)
    [{'n': 2}]
    """
    return _some_rows(items, range(min(count, len(items)), len(items)))


def _some_rows(items: Sequence[Item], chosen: range) -> Sequence[Item]:
    return SomeRows(items, chosen) if isinstance(items, Rows) else [items[index] for index in chosen]


def place_of(items: Sequence[Item], index: int) -> str:
    """The name of an item in messages: its index from 0 and, for a row of a file, its place in the file.

    >>> place_of([{"n": 1}], 0), place_of(DictRows("a.csv", [{"n": "1"}], [2]), 0)
    ('item 0', 'item 0 (a.csv, line 2)')
    """
    return f"item {index} ({items.where(index)})" if isinstance(items, Rows) else f"item {index}"


def unreadable(file: str, place: str, field: str | None, problem: object) -> ConfigError:
    """The error for a row that cannot be read. It names the file, the line and the field.

    >>> str(unreadable("a.jsonl", "line 3", "answer", "Expecting value"))
    "a.jsonl, line 3, field 'answer' cannot be read: Expecting value"
    """
    parts = [file, place, *([] if field is None else [f"field {field!r}"])]
    return ConfigError(f"{', '.join(part for part in parts if part)} cannot be read: {problem}")


def check_row(file: str, place: str, value: object) -> None:
    """Rejects a row that is not a mapping.

    Raises:
        ConfigError: It is not a mapping. The message contains its place and type.
    """
    if not isinstance(value, Mapping):
        raise unreadable(file, place, None, f"it is a {type(value).__name__}, but a row must be a JSON object")
