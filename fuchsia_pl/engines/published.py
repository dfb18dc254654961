"""Folders of weights for servers, named by version, content and, for adapters, place. Each appears whole or not at all."""

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
    """Weights that servers can load: an adapter or, where all weights are trained, a whole model.

    Attributes:
        name: Name that requests use: version, content and, for an adapter, place. No server can answer with other weights.
        version: The optimizer step of these weights.
        folder: Their folder. Servers load adapters from it.

    >>> PublishedWeights("policy-3-0123456789ab", 3, Path("/shared/policy-3-0123456789ab")).name
    'policy-3-0123456789ab'
    """

    name: str
    version: int
    folder: Path


class Publisher:
    """The weights that one rank has published, newest last.

    Args:
        root: A folder that trainer and servers see under the same path.
        num_kept: How many folders stay.
        copies: Whether this rank copies the files. A rank that does not only computes their name.
    """

    def __init__(self, root: Path, num_kept: int, copies: bool) -> None:
        self._root, self._num_kept, self._copies = root, num_kept, copies
        self._published: list[PublishedWeights] = []

    @property
    def names(self) -> set[str]:
        """Names of all weights with an existing folder."""
        return {weights.name for weights in self._published}

    @property
    def outdated_names(self) -> set[str]:
        """Names of the weights that the newest `num_kept` have replaced."""
        return {weights.name for weights in self._published[: -self._num_kept]}

    def publish(self, path: Path, version: int) -> PublishedWeights:
        """Publishes weights as the newest ones; for the arguments and errors see `publish`."""
        weights = (publish if self._copies else named)(path, version, self._root)
        self._published = [*(known for known in self._published if known != weights), weights]
        return weights

    def remove_outdated(self) -> None:
        """Deletes the folders of the outdated weights."""
        for weights in self._published[: -self._num_kept]:
            remove_published(weights)
        self._published = self._published[-self._num_kept :]

    def remove_all(self) -> None:
        """Deletes all folders."""
        for weights in self._published:
            remove_published(weights)
        self._published = []


def named(path: Path, version: int, root: Path) -> PublishedWeights:
    """Name and folder of weights when they are published; the same on every rank.

    Args:
        path: A folder that `Policy.save_trained` wrote.
        version: The version that the folder must have.
        root: A folder that trainer and servers see under the same path.

    Raises:
        EngineError: The folder has another version.
    """
    check_version_file(path, version)
    # An earlier run may have left the same adapter on a server. That server would reload it from a deleted folder.
    place = str(root.absolute()) if is_adapter(path) else ""
    name = f"policy-{version}-{_digest(path, place)}"
    return PublishedWeights(name, version, (root / name).absolute())


def publish(path: Path, version: int, root: Path) -> PublishedWeights:
    """Copies weights to a folder that servers can read; for the arguments see `named`.

    Raises:
        EngineError: The folder has another version, or cannot be copied.
    """
    weights = named(path, version, root)
    # Ranks with the same process id on different machines or in different containers may share one folder.
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
    """Deletes a published folder, and its parent if that is empty now."""
    shutil.rmtree(weights.folder, ignore_errors=True)
    try:
        weights.folder.parent.rmdir()
    except OSError:  # it holds other folders
        return


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(partial, ignore_errors=True)  # another rank was first; equal names mean equal content


def _digest(path: Path, place: str) -> str:
    """Equal for equal weights in the same place. PEFT writes lists of layers in a different order in each process."""
    config = json.loads((path / (ADAPTER_CONFIG if is_adapter(path) else CONFIG_NAME)).read_text())
    ordered = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    digest = hashlib.sha256(json.dumps([place, ordered], sort_keys=True).encode())
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:HASH_DIGITS]
