"""Whether a file that torch wrote is still what was written: each record of its archive has a checksum, which torch skips."""

import io
import zipfile
from pathlib import Path
from typing import IO

from fuchsia_pl.types import ConfigError


def check_intact(path: Path) -> None:
    """Reads a file once and compares every record with its checksum.

    Args:
        path: A file that `torch.save` wrote.

    Raises:
        ConfigError: A record is not as it was written, or the file is cut off or another format.
    """
    with path.open("rb") as stream:
        damage = _damage(stream)
    if damage is not None:
        raise ConfigError(
            f"the checkpoint {path} is damaged, cut off, or no checkpoint of this program: {damage}. Give another one"
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


def _damage(stream: IO[bytes]) -> str | None:
    try:
        with zipfile.ZipFile(stream) as archive:
            broken = archive.testzip()
    except Exception as error:  # a damaged directory fails in whatever way its bytes lead to
        return str(error).partition("\n")[0][:120] or type(error).__name__
    return None if broken is None else f"the checksum of {broken} is another one"
