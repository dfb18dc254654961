"""Reads rows from CSV and Parquet files and from folders saved by `datasets`."""

import csv
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuchsia_pl.envs.json_rows import decode_whole, finite
from fuchsia_pl.envs.rows import DictRows, Rows, unreadable
from fuchsia_pl.types import ConfigError, Item

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Table

INT = re.compile(r"[+-]?[0-9]+", flags=re.ASCII)
FLOAT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", flags=re.ASCII)
BOOLS = {"true": True, "True": True, "false": False, "False": False}


def read_csv(file: str, content: bytes, delimiter: str, types: Mapping[str, str]) -> DictRows:
    r"""The rows of a CSV file with a header. Values are text, except in columns with a declared type.

    Args:
        file: Name of the file, for messages.
        content: Contents of the file, in UTF-8.
        delimiter: Delimiter between values.
        types: Types by name of the columns that are not text; keys of `CSV_TYPES`.

    Raises:
        ConfigError: The file is not CSV, a row has too few or too many values, or a value does not have its column's type.

    >>> list(read_csv("a.csv", b"answer,day\n72,2024-01-05\n", ",", {"answer": "int"}))
    [{'answer': 72, 'day': '2024-01-05'}]
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise unreadable(file, f"line {line}", None, "it is not UTF-8") from error
    records = _records(file, text, delimiter)
    _, columns = next(records, (1, []))
    _check_columns(file, columns, types)
    rows, lines = [], []
    for line, values in records:
        if len(values) < len(columns):
            raise unreadable(file, f"line {line}", columns[len(values)], "the row ends before this column")
        if len(values) > len(columns):
            raise unreadable(file, f"line {line}", None, f"it has {len(values)} values for {len(columns)} columns")
        rows.append(
            {column: _typed(file, line, column, types, value) for column, value in zip(columns, values, strict=True)}
        )
        lines.append(line)
    return DictRows(file, rows, lines)


class ParquetRows(Rows):
    """The rows of a Parquet file, converted by pyarrow.

    Args:
        file: Path of the file.

    Raises:
        ConfigError: It cannot be read, or two columns have the same name.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._table = _parquet_table(file)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, index: int) -> Item:
        """The row, converted to Python's types."""
        with _convertible(self, index, lambda name: self._row(index, [name]), self._table.column_names):
            return self._row(index, self._table.column_names)

    def where(self, index: int) -> str:
        """File and number of the row."""
        return f"{self._file}, row {index + 1}"

    def _row(self, index: int, names: Sequence[str]) -> Item:
        row: dict[str, Any] = self._table.select(names).slice(index, 1).to_pylist()[0]
        return row


class SavedRows(Rows):
    """The rows of a folder written by `save_to_disk` of `datasets`.

    Args:
        folder: Path of the folder.
        split: Split to read if the folder contains several.

    Raises:
        ConfigError: It is not such a folder, or does not contain the split.
    """

    def __init__(self, folder: str, split: str) -> None:
        self._folder = folder
        self._dataset = _saved_dataset(folder, split)

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, index: int) -> Item:
        """The row, decoded by `datasets`."""
        dataset = self._dataset
        with _convertible(self, index, lambda name: dataset.select_columns([name])[index], dataset.column_names):
            row: dict[str, Any] = dataset[index]
            return row

    def where(self, index: int) -> str:
        """Folder and number of the row."""
        return f"{self._folder}, row {index + 1}"


def _records(file: str, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV text, each with the number of its first line. Empty lines are skipped."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    longest = csv.field_size_limit(sys.maxsize)  # a global limit, by default 131,072 characters
    line = 1
    try:
        for values in reader:
            if values:
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise unreadable(file, f"line {line}", None, error) from error
    finally:
        csv.field_size_limit(longest)


def _check_columns(file: str, columns: Sequence[str], types: Mapping[str, str]) -> None:
    if len(set(columns)) < len(columns) or "" in columns:
        raise unreadable(file, "line 1", None, f"the header must name each column once, got {list(columns)}")
    unknown = sorted(set(types) - set(columns))
    if unknown and columns:
        raise ConfigError(f"csv_types names {unknown}, but the columns of {file} are {list(columns)}")


def _typed(file: str, line: int, column: str, types: Mapping[str, str], text: str) -> Any:
    if column not in types:
        return text
    try:
        return CSV_TYPES[types[column]](text)
    except ValueError as error:
        raise unreadable(file, f"line {line}", column, error) from error


def _int(text: str) -> int:
    if not INT.fullmatch(text):
        raise ValueError(f"{text!r} is not an integer, but csv_types declares int")
    return int(text)


def _float(text: str) -> float:
    if not FLOAT.fullmatch(text):
        raise ValueError(f"{text!r} is not a decimal number, but csv_types declares float")
    return finite(text)


def _bool(text: str) -> bool:
    if text not in BOOLS:
        raise ValueError(f"{text!r} is neither true nor false, but csv_types declares bool")
    return BOOLS[text]


# Allowed types of CSV columns, with the functions that convert their values.
CSV_TYPES: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": _int,
    "float": _float,
    "bool": _bool,
    "json": decode_whole,
}


def _parquet_table(file: str) -> "Table":
    from pyarrow import parquet

    names: list[str] = []
    try:
        # `read_table` would interpret parts of the path such as "split=train" as columns.
        opened = parquet.ParquetFile(file)
        names = opened.schema_arrow.names
        table = opened.read()
    except Exception as error:  # pyarrow raises many kinds of exceptions, all about the file
        raise unreadable(file, "", _broken_column(file, names), f"{type(error).__name__}: {error}") from error
    if len(set(names)) < len(names):
        raise unreadable(file, "", None, f"two of its columns have the same name: {names}")
    return table


def _broken_column(file: str, names: Sequence[str]) -> str | None:
    from pyarrow import parquet

    for name in names:
        try:
            parquet.ParquetFile(file).read(columns=[name])
        except Exception:  # the same exceptions as for the whole file; here they identify the column
            return name
    return None


def _saved_dataset(folder: str, split: str) -> "Dataset":
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        saved = load_from_disk(folder)
    except Exception as error:  # `datasets` raises many kinds of exceptions, all about the folder
        raise ConfigError(
            f"the folder {folder} was not saved by `save_to_disk` of datasets, or is damaged ({type(error).__name__}: "
            f"{error}): name such a folder, or files in it, such as {str(Path(folder) / '*.parquet')!r}"
        ) from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ConfigError(f"the folder {folder} has no split {split!r}, its splits are {sorted(saved)}")
        saved = saved[split]
    assert isinstance(saved, Dataset)
    return saved.with_format(None)  # a saved tensor format would convert numbers to tensors


@contextmanager
def _convertible(rows: Rows, index: int, read: Callable[[str], Any], names: Sequence[str]) -> Iterator[None]:
    """Names the row and the field if pyarrow or `datasets` cannot convert a value to a Python type."""
    try:
        yield
    except Exception as error:
        for name in names:
            try:
                read(name)
            except Exception as cause:  # the same error, for one field
                raise unreadable(rows.where(index), "", name, f"{type(cause).__name__}: {cause}") from error
        raise
