"""Reads and verifies checkpoint files before anything is built from them."""

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.checksums import check_intact, damaged_part, part_of
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.contents import AVERAGED_WEIGHTS
from fuchsia_pl.policy.sharding import FOLDER_METADATA, older_folder
from fuchsia_pl.policy.tensor_files import first_difference
from fuchsia_pl.progress import progress
from fuchsia_pl.types import ConfigError

MICRO_BATCHES_KEY = "num_micro_batches"
SHAPES_KEY = "trained_shapes"
OPTIMIZER_SHAPES_KEY = "optimizer_shapes"
OPTIMIZATION_KEY = "optimization"
SETTINGS_KEY = "settings"
OWN_KEYS = (
    *("global_step", "loops", "pytorch-lightning_version"),
    *(MICRO_BATCHES_KEY, SHAPES_KEY, OPTIMIZER_SHAPES_KEY, OPTIMIZATION_KEY, SETTINGS_KEY),
)
FOLDER_INDEX = ".metadata"  # DCP's name
# Classes that may appear in the index of a folder checkpoint; a pickle of other classes could run code.
INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint; the bytes of its tensors stay on disk until they are used. No code in the file is run.

    Args:
        path: A file, or a folder to which each rank wrote its shards.

    Returns:
        The content saved by Lightning; for a folder, without weights and optimizers.

    Raises:
        ConfigError: The checkpoint is missing, empty, cut off, damaged, of another kind, or of another program.
    """
    if not path.exists() and older_folder(path).is_dir():
        path = older_folder(path)  # left by a kill between two renames; `FSDP2Strategy` loads it too
    if not path.exists():
        raise ConfigError(f"the checkpoint {path} does not exist: give the path of a checkpoints/last.ckpt, or `last`")
    if path.is_dir():
        return _read_folder(path)
    if path.stat().st_size == 0:
        raise ConfigError(f"the checkpoint {path} is empty: its run was killed, or the disk was full. Give another one")
    with progress.activity(f"reading {path.name}"):
        checkpoint = _read_file(path)
    check_contents(checkpoint, str(path))
    return checkpoint


def _read_file(path: Path) -> dict[str, Any]:
    try:
        # A file that is cut off lacks the directory of its archive, which is at the end.
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a file of unknown origin can make the unpickler raise any exception
        reason = str(error).partition("\n")[0][:120]
        raise ConfigError(
            f"the checkpoint {path} is cut off, or is not a checkpoint of this program, which holds only tensors and plain "
            f"values ({type(error).__name__}: {reason}): give another one"
        ) from error
    check_intact(path)
    if not isinstance(found, dict):
        raise ConfigError(
            f"the checkpoint {path} is not a checkpoint: it holds a {type(found).__name__}. Give another one"
        )
    return found


def check_contents(checkpoint: Mapping[str, Any], name: str) -> None:
    """Compares the tensors of a checkpoint with the list saved in it, in both directions.

    Args:
        checkpoint: As returned by `read_checkpoint`.
        name: Name of the checkpoint, for the error message.

    Raises:
        ConfigError: It belongs to another program, or a tensor is missing, unexpected, or has another shape.
    """
    _check_keys(checkpoint, name)
    if "state_dict" not in checkpoint:
        raise ConfigError(
            f"the checkpoint {name} is not a checkpoint of Fuchsia-PL: it has no state_dict. Give another one"
        )
    for key in ("state_dict", AVERAGED_WEIGHTS):
        if key in checkpoint:
            weights = {weight: tuple(tensor.shape) for weight, tensor in checkpoint[key].items()}
            _check_shapes(checkpoint[SHAPES_KEY], weights, name)
    _check_shapes(checkpoint[OPTIMIZER_SHAPES_KEY], optimizer_shapes(checkpoint), name)


def optimizer_shapes(checkpoint: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in the optimizers' states, with the names used in a folder checkpoint.

    >>> optimizer_shapes({"optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2, 3)}}, "param_groups": []}]})
    {'optimizer_0.state.0.exp_avg': (2, 3)}
    """
    states = checkpoint.get("optimizer_states", [])
    return {
        name: shape
        for number, state in enumerate(states)
        for name, shape in _tensor_shapes(f"optimizer_{number}", state)
    }


def _tensor_shapes(name: str, value: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    if isinstance(value, torch.Tensor):
        yield name, tuple(value.shape)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensor_shapes(f"{name}.{key}", entry)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _tensor_shapes(f"{name}.{index}", entry)


def _check_keys(checkpoint: Mapping[str, Any], name: str) -> None:
    lacking = [key for key in OWN_KEYS if key not in checkpoint]
    if lacking:
        raise ConfigError(
            f"the checkpoint {name} is not a checkpoint of this version of Fuchsia-PL: it has no {lacking[0]}. Give another "
            "one, or start from an exported adapter with model.policy.lora.init_from"
        )


def _check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], name: str) -> None:
    difference = first_difference(expected, found)
    if difference:
        raise ConfigError(
            f"the checkpoint {name} does not match the list of tensors saved in it: {difference}. Give another one"
        )


def check_trained(trained: Mapping[str, tuple[int, ...]], checkpoint: Mapping[str, Any]) -> None:
    """Compares the weights that a config trains with those of a checkpoint.

    Raises:
        ConfigError: They are not the same.
    """
    found = checkpoint[SHAPES_KEY]
    difference = first_difference(trained, found)
    if difference:
        raise ConfigError(
            f"the checkpoint holds {len(found)} trained tensors, this config trains {len(trained)}, and names or shapes "
            f"differ: {difference}. Use the config.yaml of the run that wrote it"
        )


def begin_next_epoch(checkpoint: Mapping[str, Any]) -> None:
    """Sets the counters of a checkpoint that was saved after an epoch had ended to the start of the next one.

    The end of a run saves such a checkpoint. Lightning 2.6 continues it within the epoch that has ended: it would train on one
    micro-batch of the next step and then begin another epoch.

    Args:
        checkpoint: A checkpoint with the state of Lightning's loops, which is changed.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
    if not batches["is_last_batch"] or epochs["completed"] < epochs["ready"]:
        return
    batches["is_last_batch"] = False
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    schedule = loops["epoch_loop.scheduler_progress"]
    for counted in (batches, schedule, optimizer["step"], optimizer["zero_grad"]):
        counted["current"] = dict.fromkeys(counted["current"], 0)


def check_between_phases(checkpoint: Mapping[str, Any], steps_per_phase: int) -> None:
    """Rejects a checkpoint that was saved within a step or a phase.

    Raises:
        ConfigError: The checkpoint was saved within a step or a phase.
    """
    step = checkpoint["global_step"]
    if step % steps_per_phase:
        raise ConfigError(
            f"the checkpoint is of step {step}, which is not a multiple of the {steps_per_phase} steps of a phase "
            "(model.loss.mini_batches x num_policy_updates): the rollouts of a phase are not saved, so a run resumes only from "
            "the end of a phase, such as checkpoints/last.ckpt"
        )
    # Micro-batches of the epoch that had begun, counted by Lightning.
    loops = checkpoint["loops"]
    num_begun = loops["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] if loops else 0
    num_within = num_begun % checkpoint[MICRO_BATCHES_KEY]
    if num_within:
        raise ConfigError(
            f"the checkpoint was saved {num_within} micro-batches into the step after {step}, whose gradients it "
            "does not hold: a run resumes only from the end of a step, such as checkpoints/last.ckpt"
        )


def _read_folder(path: Path) -> dict[str, Any]:
    for required in (FOLDER_INDEX, FOLDER_METADATA):
        if not (path / required).is_file():
            raise ConfigError(
                f"the checkpoint {path} is a folder without {required}, which FSDP2Strategy writes last: give a file last.ckpt, "
                "or a whole folder of that strategy"
            )
    index = _read_index(path / FOLDER_INDEX)
    checkpoint = _read_file(path / FOLDER_METADATA)
    _check_keys(checkpoint, str(path))
    tensors = {
        name: tuple(entry.size)
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    weights = {name.removeprefix("state_dict."): s for name, s in tensors.items() if name.startswith("state_dict.")}
    optimizers = {name: shape for name, shape in tensors.items() if name.startswith("optimizer_")}
    _check_shapes(checkpoint[SHAPES_KEY], weights, str(path))
    _check_shapes(checkpoint[OPTIMIZER_SHAPES_KEY], optimizers, str(path))
    _check_parts(path, index)
    return checkpoint


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of a folder checkpoint and rejects all other classes."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _read_index(file: Path) -> Metadata:
    try:
        with file.open("rb") as stream:
            index = _IndexUnpickler(stream).load()
        assert isinstance(index, Metadata), f"it is a {type(index).__name__}"
        assert isinstance(index.storage_data, dict), "it names no files"
    except Exception as error:  # a file of unknown origin can make the unpickler raise any exception
        raise ConfigError(
            f"the checkpoint {file.parent} is cut off, or is not of this program: its {file.name} cannot be read "
            f"({type(error).__name__}: {error}). Give another one"
        ) from error
    return index


def _check_parts(path: Path, index: Metadata) -> None:
    """Checks that every value is complete, and that values which DCP unpickles without restriction run no code."""
    damage = damaged_part(path, index)
    if damage is not None:
        raise ConfigError(f"the checkpoint {path} is not complete: {damage}. Give another one")
    for key, place in index.storage_data.items():
        if isinstance(index.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
            try:
                torch.load(io.BytesIO(part_of(path, place)), weights_only=True)
            except Exception as error:  # as above
                raise ConfigError(
                    f"the checkpoint {path} holds a value that is broken or would run code ({key.fqn}): give another one"
                ) from error


def parsed_settings(settings: Mapping[str, Any]) -> Any:
    """Constructs the configs that a checkpoint contains as plain data, or raises ConfigError."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=PolicyConfig)
    parser.add_argument("--loss", type=LossConfig)
    try:
        return parser.instantiate(parser.parse_object(dict(settings)))
    except Exception as error:  # of several classes of jsonargparse
        raise ConfigError(f"the settings are not of this version: {' '.join(str(error).split())}") from error
