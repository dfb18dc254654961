"""Leaves what was trained in the run folder, in a format that any tool loads."""

import os
import shutil
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.policy.policy import Policy

ADAPTER_FOLDER = "adapter"


class ExportedModule(Protocol):
    """What this callback knows of the module."""

    policy: Policy


class AdapterExport(Callback):
    """Writes `adapter/` (with LoRA off: a whole model) whenever a checkpoint is saved, and at the end of training.

    `PeftModel.from_pretrained` loads it. Each file is replaced by one rename, so a run killed at any moment leaves the old
    or the new weights.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Exports beside every checkpoint."""
        self._export(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the last weights."""
        self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        target = Path(trainer.default_root_dir) / ADAPTER_FOLDER
        partial = target.with_name(f".{ADAPTER_FOLDER}")
        shutil.rmtree(partial, ignore_errors=True)
        cast(ExportedModule, pl_module).policy.save_trained(partial)
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(partial.iterdir()):
            os.replace(file, target / file.name)
        partial.rmdir()
