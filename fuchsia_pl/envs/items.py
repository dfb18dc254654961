"""Loads items from the hub or from local files."""

import glob
import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

from fuchsia_pl.envs.json_rows import BYTE_ORDER_MARK, JSON_SPACE, read_json
from fuchsia_pl.envs.rows import JoinedRows, Rows
from fuchsia_pl.envs.table_rows import ParquetRows, SavedRows, read_csv
from fuchsia_pl.types import ConfigError, Item

DELIMITERS = {".csv": ",", ".tsv": "\t"}
GZIP_MARK = b"\x1f\x8b"
PARQUET_MARK = b"PAR1"
READABLE = "JSON lines, a JSON array, CSV (named .csv or .tsv), these three also in gzip, Parquet, or a folder of `save_to_disk`"


class ItemSource(NamedTuple):
    """Source of the items of a split.

    Attributes:
        files: Local files, in order: paths or patterns such as "data/*.jsonl". They take precedence over the hub.
        dataset: Name of a dataset on the hub.
        config: Configuration of the hub dataset.
        split: Split of the hub dataset or of a saved folder.

    >>> ItemSource(None, "openai/gsm8k", "main", "train").paths("train_file")
    []
    """

    files: str | Sequence[str] | None
    dataset: str | None
    config: str | None
    split: str

    def paths(self, setting: str) -> list[str]:
        """The named files and folders. Files that match a pattern are sorted by name.

        Raises:
            ConfigError: One does not exist, or a pattern matches nothing.
        """
        names = [self.files] if isinstance(self.files, str) else list(self.files or ())
        if self.files is not None and not names:
            raise ConfigError(f"{setting} is an empty list: name a file, or leave it out")
        return [path for name in names for path in _matching(setting, name)]


def load_items(kind: str, split: str, source: ItemSource, csv_types: Mapping[str, str]) -> Sequence[Item]:
    """Rows of local files if any are named, else of a dataset on the hub.

    Args:
        kind: Name of the environment, for messages.
        split: "train" or "validation", for messages.
        source: Source of the rows.
        csv_types: Types by name of the CSV columns that are not text.

    Raises:
        ConfigError: No source is named, it cannot be read, or it has no rows.
    """
    if source.files is None and source.dataset is None:
        raise ConfigError(
            f"{kind} has no {split} items: set data.environment.init_args.{split}_file or .dataset, or override "
            f"{split}_items()"
        )
    if source.files is None:
        if csv_types:
            raise ConfigError(
                f"{kind}.csv_types declares {sorted(csv_types)}, but the {split} items are not from a CSV file"
            )
        rows, what = (
            _from_hub(kind, split, source),
            f"{source.dataset} ({source.config or 'default'}, split {source.split})",
        )
    else:
        paths = source.paths(f"data.environment.init_args.{split}_file")
        parts = [read_rows(path, source.split, csv_types) for path in paths]
        rows, what = parts[0] if len(parts) == 1 else JoinedRows(parts), ", ".join(paths)
    if len(rows) == 0:
        raise ConfigError(f"{kind}: {what} has no {split} items")
    return rows


def read_rows(path: str, split: str, csv_types: Mapping[str, str]) -> Rows:
    """The rows of a file or folder. The first bytes determine the format; CSV is recognised by the name.

    Args:
        path: Path of the file or folder.
        split: Split to read from a folder that contains several.
        csv_types: See `load_items`.

    Raises:
        ConfigError: It cannot be read.
    """
    if Path(path).is_dir():
        return _untyped(path, csv_types, SavedRows(path, split))
    with _readable(path), Path(path).open("rb") as stream:
        mark = stream.read(len(PARQUET_MARK))
    if mark == PARQUET_MARK:
        return _untyped(path, csv_types, ParquetRows(path))
    suffixes = [suffix for suffix in Path(path).suffixes if suffix != ".gz"]
    delimiter = DELIMITERS.get(suffixes[-1].lower()) if suffixes else None
    with _readable(path), gzip.open(path) if mark.startswith(GZIP_MARK) else Path(path).open("rb") as stream:
        if delimiter is not None:
            return read_csv(path, stream.read(), delimiter, csv_types)
        lines = stream.readlines()
    first = next((line.strip(JSON_SPACE) for line in lines if line.strip(JSON_SPACE)), b"{")
    if first.removeprefix(BYTE_ORDER_MARK)[:1] not in (b"{", b"["):
        raise ConfigError(
            f"{path} begins with {first[:20]!r}, which is not a row: the supported formats are {READABLE}"
        )
    return _untyped(path, csv_types, read_json(path, lines))


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _untyped(path: str, csv_types: Mapping[str, str], rows: Rows) -> Rows:
    if csv_types:
        raise ConfigError(
            f"csv_types declares {sorted(csv_types)}, but {path} is not a CSV file: its values already have types. Leave "
            "csv_types empty, or name the file .csv"
        )
    return rows


def _matching(setting: str, name: str) -> list[str]:
    if Path(name).exists():
        return [name]
    found = sorted(glob.glob(name, recursive=True))
    if not found:
        what = "no file matches" if any(mark in name for mark in "*?[") else "there is no file"
        raise ConfigError(f"{setting}: {what} {str(Path(name).absolute())!r}")
    return found


def _from_hub(kind: str, split: str, source: ItemSource) -> Sequence[Item]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.dataset, source.config, split=source.split)
    except Exception as error:  # `datasets` raises many kinds of exceptions, all about the named dataset
        raise ConfigError(
            f"{kind}: {split} items could not be read from {source.dataset} ({source.config or 'default'}, split {source.split}) "
            f"({type(error).__name__}: {' '.join(str(error).split())}). The hub requires network access or a cached copy"
        ) from error
    return cast(Sequence[Item], rows)
