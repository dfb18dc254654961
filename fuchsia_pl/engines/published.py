"""Folders of weights for servers: named by version, content and, of adapters, place; there as a whole or not at all."""

import hashlib
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import CONFIG_NAME

from fuchsia_pl.engines.base import EngineError, check_version_file
from fuchsia_pl.engines.merge import ADAPTER_CONFIG, is_adapter

HASH_DIGITS = 12


@dataclass(frozen=True)
class PublishedWeights:
    """What servers can be given: an adapter, or where all weights are trained, all of them.

    Attributes:
        name: What requests ask for. It says version, content and, of an adapter, place: no server can answer with others.
        version: The optimizer step whose weights these are.
        folder: Where they lie; servers load adapters from there.

    >>> PublishedWeights("policy-3-0123456789ab", 3, Path("/shared/policy-3-0123456789ab")).name
    'policy-3-0123456789ab'
    """

    name: str
    version: int
    folder: Path


def named(path: Path, version: int, root: Path) -> PublishedWeights:
    """What weights are called when they are published, on whichever rank.

    Args:
        path: What `Policy.save_trained` wrote.
        version: The version that must be there.
        root: A folder that trainer and servers see under the same path.

    Raises:
        EngineError: They are of another version.
    """
    check_version_file(path, version)
    # An earlier run may have left the same adapter on a server, which loads it again from a folder that is gone.
    place = str(root.absolute()) if is_adapter(path) else ""
    name = f"policy-{version}-{_digest(path, place)}"
    return PublishedWeights(name, version, (root / name).absolute())


def publish(path: Path, version: int, root: Path) -> PublishedWeights:
    """Copies weights to where servers find them; for the arguments see `named`.

    Raises:
        EngineError: They are of another version, or cannot be copied.
    """
    weights = named(path, version, root)
    # Ranks of one process id on different machines or in different containers may see one folder.
    folder, partial = weights.folder, weights.folder.with_name(f".{weights.name}-{uuid.uuid4().hex}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            shutil.copytree(path, partial, dirs_exist_ok=True)
            _rename(partial, folder)
    except OSError as error:
        raise EngineError(
            f"weights cannot be copied to data.engine.init_args.adapter_folder={root} ({type(error).__name__}: {error}): "
            "name a folder that trainer and servers see under the same path"
        ) from error
    return weights


def remove_published(weights: PublishedWeights) -> None:
    """Deletes a published folder, and the one that held it if that is empty now."""
    shutil.rmtree(weights.folder, ignore_errors=True)
    try:
        weights.folder.parent.rmdir()
    except OSError:  # it holds others
        return


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(partial, ignore_errors=True)  # another rank was first; the name says that it is the same


def _digest(path: Path, place: str) -> str:
    """The same for the same weights in the same place: PEFT writes lists of layers in an order of its own in each process."""
    config = json.loads((path / (ADAPTER_CONFIG if is_adapter(path) else CONFIG_NAME)).read_text())
    ordered = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    digest = hashlib.sha256(json.dumps([place, ordered], sort_keys=True).encode())
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:HASH_DIGITS]
