"""Verifies the checksums in files written by torch: each record of the archive has one, and `torch.load` ignores it."""

import io
import zipfile
from pathlib import Path
from typing import IO

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from fuchsia_pl.types import ConfigError


def check_intact(path: Path, kind: str = "checkpoint") -> None:
    """Reads a file once and compares each record with its checksum.

    Args:
        path: A file written by `torch.save`.
        kind: Name of the file's kind, for the error message.

    Raises:
        ConfigError: A record does not match its checksum, or the file is cut off or has another format.
    """
    with path.open("rb") as stream:
        damage = _damage(stream)
    if damage is not None:
        raise ConfigError(
            f"the {kind} {path} is damaged, cut off, or not a {kind} of this program: {damage}. Give another one"
        )


def damage_of(content: bytes) -> str | None:
    """Describes the first fault in the bytes of a file written by `torch.save`; None if there is none.

    >>> import torch
    >>> stream = io.BytesIO()
    >>> torch.save(torch.zeros(8), stream)
    >>> damage_of(stream.getvalue()), damage_of(stream.getvalue()[:-9])
    (None, 'File is not a zip file')
    """
    return _damage(io.BytesIO(content))


def damaged_part(path: Path, index: Metadata) -> str | None:
    """Describes the first fault in a folder checkpoint written by FSDP2Strategy; None if there is none.

    Args:
        path: The folder.
        index: The content of its index file.
    """
    for key, place in index.storage_data.items():
        assert isinstance(place, _StorageInfo)
        part = path / place.relative_path
        if part.parent != path or not part.is_file() or part.stat().st_size < place.offset + place.length:
            return f"{place.relative_path} is missing or cut off before {key.fqn}"
        damage = damage_of(part_of(path, place))
        if damage is not None:
            return f"{part.name} is damaged at {key.fqn}: {damage}"
    return None


def part_of(path: Path, place: _StorageInfo) -> bytes:
    """The bytes of one value of a folder checkpoint."""
    with (path / place.relative_path).open("rb") as stream:
        stream.seek(place.offset)
        return stream.read(place.length)


def _damage(stream: IO[bytes]) -> str | None:
    try:
        with zipfile.ZipFile(stream) as archive:
            broken = archive.testzip()
    except Exception as error:  # a damaged archive directory can raise any exception
        return str(error).partition("\n")[0][:120] or type(error).__name__
    return None if broken is None else f"{broken} does not match its checksum"
