"""Whether a file that torch wrote is still what was written: each record of its archive has a checksum, which torch skips."""

import io
import zipfile
from pathlib import Path
from typing import IO

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from fuchsia_pl.types import ConfigError


def check_intact(path: Path, kind: str = "checkpoint") -> None:
    """Reads a file once and compares every record with its checksum.

    Args:
        path: A file that `torch.save` wrote.
        kind: What the file should be, for the error.

    Raises:
        ConfigError: A record is not as it was written, or the file is cut off or another format.
    """
    with path.open("rb") as stream:
        damage = _damage(stream)
    if damage is not None:
        raise ConfigError(
            f"the {kind} {path} is damaged, cut off, or no {kind} of this program: {damage}. Give another one"
        )


def damage_of(content: bytes) -> str | None:
    """What is wrong with the bytes of a file that `torch.save` wrote; None where nothing is.

    >>> import torch
    >>> stream = io.BytesIO()
    >>> torch.save(torch.zeros(8), stream)
    >>> damage_of(stream.getvalue()), damage_of(stream.getvalue()[:-9])
    (None, 'File is not a zip file')
    """
    return _damage(io.BytesIO(content))


def damaged_part(path: Path, index: Metadata) -> str | None:
    """What is wrong with the parts of a folder that FSDP2Strategy wrote, and where; None where nothing is.

    Args:
        path: The folder.
        index: What its index file holds.
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
    """The bytes of one value of a folder of parts."""
    with (path / place.relative_path).open("rb") as stream:
        stream.seek(place.offset)
        return stream.read(place.length)


def _damage(stream: IO[bytes]) -> str | None:
    try:
        with zipfile.ZipFile(stream) as archive:
            broken = archive.testzip()
    except Exception as error:  # a damaged directory fails in whatever way its bytes lead to
        return str(error).partition("\n")[0][:120] or type(error).__name__
    return None if broken is None else f"the checksum of {broken} is another one"
