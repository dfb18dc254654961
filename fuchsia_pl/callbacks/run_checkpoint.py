"""Checkpoints in the run folder."""

import math
from pathlib import Path
from typing import Protocol, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.types import ConfigError

LAST = "last"


class PhasedModule(Protocol):
    """What this callback knows of the module."""

    loss_config: LossConfig


class RunCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt` every few optimizer steps and at the end of training, written atomically.

    For the best by a metric, add Lightning's own ModelCheckpoint to `trainer.callbacks`.

    Args:
        every_n_steps: Optimizer steps between two saves, rounded up to whole phases: the rollouts of a phase are not saved, so
            a run resumes where one begins.
    """

    def __init__(self, every_n_steps: int = 5) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"checkpoint.every_n_steps must be 1 or more, got {every_n_steps}")
        super().__init__(filename=LAST, every_n_train_steps=every_n_steps, enable_version_counter=False)
        self.every_n_steps = every_n_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the run folder, whatever the loggers are."""
        self.dirpath = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        num_updates = cast(PhasedModule, pl_module).loss_config.num_policy_updates
        self._every_n_train_steps = math.ceil(self.every_n_steps / num_updates) * num_updates
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step, which need not be a multiple of `every_n_steps`."""
        assert self.dirpath is not None
        if trainer.global_step % cast(PhasedModule, pl_module).loss_config.num_policy_updates:
            return  # stopped within a phase
        trainer.save_checkpoint(Path(self.dirpath) / f"{LAST}.ckpt")
