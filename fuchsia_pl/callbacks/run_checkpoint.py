"""Checkpoints in the run folder, written atomically."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fuchsia_pl.callbacks.access import is_trial, module_of
from fuchsia_pl.files import replacing, writing
from fuchsia_pl.policy.checkpoint_files import read_checkpoint
from fuchsia_pl.policy.checksums import check_intact
from fuchsia_pl.policy.sharding import FSDP2Strategy
from fuchsia_pl.progress import SAVING, progress
from fuchsia_pl.stopping import stopping
from fuchsia_pl.types import ConfigError

LAST = "last"
OLDER = "step-{}"  # an older checkpoint


def own_storage(tensor: Tensor) -> Tensor:
    """A copy if the tensor is a part of a larger storage, all of which torch would write (host copies of HotSwap).

    >>> own_storage(torch.zeros(100)[:2]).untyped_storage().nbytes()
    8
    """
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a new file and renames it over the old one: a kill or a full disk leaves one of them intact.

    Lightning's own writes to the folder for temporary files first, which may be on another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint. Lightning writes those with a URL as the path."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with progress.activity(SAVING), replacing(Path(path)) as partial, partial.open("wb") as stream:
            torch.save(tree_map_only(Tensor, own_storage, checkpoint), stream)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a checkpoint after a check of its checksums.

        Raises:
            ConfigError: The file is damaged.
        """
        with progress.activity(f"loading {Path(path).name}"):
            if Path(path).is_file():
                check_intact(Path(path))
            return super().load_checkpoint(path, map_location, weights_only)


class RunCheckpoint(ModelCheckpoint):
    """Saves `checkpoints/last.ckpt` every few optimizer steps and at the end of training, atomically.

    Older checkpoints stay as `step-<number>.ckpt`, in case the newest one turns out to be bad.

    For the best by a metric, add Lightning's own ModelCheckpoint to `trainer.callbacks`.

    Args:
        every_n_steps: Optimizer steps between two saves, rounded up to whole phases: a checkpoint contains no rollouts, so a run
            can resume only at the start of a phase.
        keep: Number of checkpoints that stay, including `last.ckpt`.

    Raises:
        ConfigError: A number is below 1.
    """

    def __init__(self, every_n_steps: int = 5, keep: int = 2) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"checkpoint.every_n_steps must be 1 or more, got {every_n_steps}")
        if keep < 1:
            raise ConfigError(f"checkpoint.keep must be 1 or more, got {keep}")
        super().__init__(filename=LAST, every_n_train_steps=every_n_steps, enable_version_counter=False)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._older: list[int] = []  # steps of the checkpoints beside `last.ckpt`, oldest first
        self._current: int | None = None  # step of `last.ckpt`

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the folder to that of the run, with any loggers."""
        self.dirpath = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        steps_per_phase = module_of(trainer).loss_config.steps_per_phase
        self._every_n_train_steps = math.ceil(self.every_n_steps / steps_per_phase) * steps_per_phase
        self._older, self._current = [], None
        if stage == "fit" and trainer.is_global_zero:
            self._older, self._current = _steps_in(Path(self.dirpath))
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves at the end of a phase. Lightning's own would also save after the first micro-batch of a resumed run."""
        if module_of(trainer).ends_phase(batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step, which need not be a multiple of `every_n_steps`."""
        if is_trial(trainer):
            return
        num_batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if not module_of(trainer).ends_phase(num_batches - 1):
            return  # a time limit or a callback stopped the run within a phase: resume from the older checkpoint
        self.save_now(trainer)

    @property
    def last_file(self) -> Path:
        """Path of the newest checkpoint."""
        assert self.dirpath is not None, "setup comes first"
        return Path(self.dirpath) / f"{LAST}.ckpt"

    @property
    def saved_step(self) -> int | None:
        """Step of `last_file`, None if this run has saved none."""
        return self._last_global_step_saved or None

    def save_now(self, trainer: Trainer) -> None:
        """Saves the current state, which must be between two phases. All ranks must call it."""
        self._save_checkpoint(trainer, str(self.last_file))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Keeps the previous checkpoint under a second name, saves, and removes the oldest one. Lightning calls this to save."""
        with stopping.saving():
            self._keep_and_save(trainer, filepath)

    def _keep_and_save(self, trainer: Trainer, filepath: str) -> None:
        path, step = Path(filepath), trainer.global_step
        if trainer.is_global_zero and self.keep > 1 and self._current not in (None, step):
            _keep_as(_older_of(path, self._current), path, trainer.strategy)
            self._older = [*(other for other in self._older if other != self._current), self._current]
        super()._save_checkpoint(trainer, filepath)
        self._current = step
        while trainer.is_global_zero and len(self._older) >= self.keep:
            _remove(_older_of(path, self._older.pop(0)))


def _steps_in(folder: Path) -> tuple[list[int], int | None]:
    """Checkpoints of an earlier run in the same folder: steps of the older ones, oldest first, and of `last.ckpt`."""
    files = sorted(folder.glob(f"{OLDER.format('*')}.ckpt"), key=lambda path: path.stat().st_mtime)
    numbers = [path.stem.removeprefix(OLDER.format("")) for path in files]
    older = [int(number) for number in numbers if number.isdecimal()]
    try:
        return older, int(read_checkpoint(folder / f"{LAST}.ckpt")["global_step"])
    except ConfigError:
        return older, None  # there is none, or it is damaged


def _older_of(last: Path, step: int | None) -> Path:
    return last.with_stem(OLDER.format(step))


def _keep_as(target: Path, source: Path, strategy: Strategy) -> None:
    """Gives a file, or all files of a folder, a second name: a hard link if that is safe and possible, otherwise a copy.

    A link is not safe if the next writer opens the existing file: it would overwrite the content of both names.

    Args:
        target: The second name.
        source: The existing file or folder.
        strategy: The strategy that writes `source` the next time.

    Raises:
        DiskError: There is no room for a copy. A partial copy is removed.
    """
    _remove(target)
    if source.is_dir():
        keep = _link_file if isinstance(strategy, FSDP2Strategy) else _copy_file
        partial = target.with_name(f".{target.name}.partial")
        _remove(partial)
        with writing(target):
            try:
                shutil.copytree(source, partial, copy_function=keep)
                partial.rename(target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    elif source.exists():
        keep = _link_file if isinstance(strategy.checkpoint_io, AtomicCheckpointIO) else _copy_file
        keep(str(source), str(target))


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has links
        _copy_file(source, target)


def _copy_file(source: str, target: str) -> None:
    with replacing(Path(target)) as partial:
        shutil.copy2(source, partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
