"""Leaves what was trained in the run folder, in a format that any tool loads."""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.callbacks.weight_average import WeightAverage
from fuchsia_pl.files import writing
from fuchsia_pl.policy.policy import Policy

ADAPTER_FOLDER = "adapter"


class ExportedModule(Protocol):
    """What this callback knows of the module."""

    policy: Policy


class AdapterExport(Callback):
    """Writes `adapter/` (with LoRA off: a whole model) whenever a checkpoint is saved, and at the end of training.

    A run that resumes from a checkpoint of its last step trains nothing, and writes the weights of that checkpoint.

    `PeftModel.from_pretrained` loads it. Each file is replaced by one rename, so a run killed at any moment leaves the old
    or the new weights, and so does a disk that is full.
    """

    def __init__(self) -> None:
        self._has_exported = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing of this run is exported yet."""
        self._has_exported = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Exports beside every checkpoint."""
        self._export(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the last weights."""
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the weights of the checkpoint if no step was left to train, where Lightning skips `on_train_end`."""
        if not self._has_exported:
            cast(ExportedModule, pl_module).policy.to_device(trainer.strategy.root_device)  # its teardown moved them
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # a trial leaves nothing behind
        policy = cast(ExportedModule, pl_module).policy
        with ExitStack() as stack:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAverage):
                    stack.enter_context(callback.applied())
            if trainer.is_global_zero:
                self._write(policy, Path(trainer.default_root_dir) / ADAPTER_FOLDER)
            else:
                policy.save_trained(Path(), writes=False)
        self._has_exported = True
        # A rank whose process ends closes its connections, also those over which the first still receives its shards.
        trainer.strategy.barrier("export")

    @staticmethod
    def _write(policy: Policy, target: Path) -> None:
        partial = target.with_name(f".{ADAPTER_FOLDER}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with writing(target):
                policy.save_trained(partial)
                target.mkdir(parents=True, exist_ok=True)
                for file in sorted(partial.iterdir()):
                    os.replace(file, target / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
