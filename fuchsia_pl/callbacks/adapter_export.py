"""Export of the trained weights to the run folder, in a format that other tools load."""

import logging
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.callbacks.access import callbacks_of, is_trial, module_of, policy_of
from fuchsia_pl.callbacks.card_facts import CARD_FILE, card_facts
from fuchsia_pl.callbacks.weight_average import WeightAverage
from fuchsia_pl.files import share_permissions, writing
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.report.model_card import model_card

ADAPTER_FOLDER = "adapter"

logger = logging.getLogger(__name__)


class AdapterExport(Callback):
    """Writes `adapter/` (with LoRA off: a whole model) with a model card whenever a checkpoint is saved, and at the end.

    A run that resumes from a checkpoint of its last step trains nothing, and writes the weights of that checkpoint.

    `PeftModel.from_pretrained` loads it. One rename replaces each file, so a killed run or a full disk leaves either the old or
    the new weights.
    """

    def __init__(self) -> None:
        self._has_exported = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resets the flag of an earlier run: this run has exported nothing yet."""
        self._has_exported = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Exports the weights of a checkpoint."""
        self._export(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the last weights."""
        self._export(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the weights of the checkpoint if no step was left to train and Lightning skipped `on_train_end`."""
        if module_of(trainer).loaded_step and not self._has_exported and not is_trial(trainer):
            policy_of(trainer).to_device(trainer.strategy.root_device)  # Lightning's teardown moved it to the host
            self._export(trainer)
            policy_of(trainer).to_device(torch.device("cpu"))

    def _export(self, trainer: Trainer) -> None:
        if is_trial(trainer):
            return
        policy = policy_of(trainer)
        with ExitStack() as stack:
            for average in callbacks_of(trainer, WeightAverage):
                stack.enter_context(average.applied())
            if trainer.is_global_zero:
                self._write(policy, Path(trainer.default_root_dir) / ADAPTER_FOLDER)
            else:
                policy.save_trained(Path(), writes=False)
        self._has_exported = True
        # A rank that ends closes its connections, over which the first rank may still receive its shards.
        trainer.strategy.barrier("export")

    @staticmethod
    def _write(policy: Policy, target: Path) -> None:
        partial = target.with_name(f".{ADAPTER_FOLDER}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with writing(target):
                policy.save_trained(partial)
                # In place of PEFT's card, which names the base by its local folder.
                (partial / CARD_FILE).write_text(_card(policy, target.parent), encoding="utf-8")
                share_permissions(partial / CARD_FILE)
                target.mkdir(parents=True, exist_ok=True)
                for file in sorted(partial.iterdir()):
                    os.replace(file, target / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _card(policy: Policy, run: Path) -> str:
    """The model card of a run; a card without facts if its files cannot be read, which is no reason to lose the weights."""
    try:
        return model_card(card_facts(run, policy.config), "peft" if policy.config.lora.enabled else "merged")
    except Exception as error:  # files of the run may hold anything
        logger.warning("the model card of %s has no facts: %s: %s", run, type(error).__name__, error)
        return f"# {run.parent.name}/{run.name}\n\nTrained with Fuchsia-PL.\n"
