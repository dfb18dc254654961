"""A warning about a run that has trained nothing."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.access import module_of

logger = logging.getLogger(__name__)


class Outcome(Callback):
    """Warns, with the reason, if a finished run has trained nothing."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._num_skipped = 0
        self._last_step = 0
        self._num_without_advantage = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resets the counts of an earlier run."""
        self._num_steps, self._num_skipped, self._num_without_advantage = 0, 0, 0
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Counts optimizer steps and skipped steps."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._num_steps += 1
            self._num_skipped += module_of(trainer).skip_reason is not None
            self._num_without_advantage += batch.step.skip_reason is not None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns with the reason if nothing was trained."""
        if trainer.is_global_zero and self._num_steps == self._num_skipped:
            logger.warning("nothing was trained: %s", self._reason(trainer))
        self._num_steps, self._num_skipped = 0, 0

    def _reason(self, trainer: Trainer) -> str:
        step, max_epochs = trainer.global_step, trainer.max_epochs
        num_without = self._num_without_advantage
        if self._num_steps > num_without > 0:
            return (
                f"all {self._num_steps} steps were skipped: in {num_without} no rollout had an advantage, see train/skipped and "
                f"reward/*; in {self._num_steps - num_without} numbers were not finite, see train/nonfinite"
            )
        if self._num_steps > num_without:
            return f"all {self._num_steps} steps were skipped, since numbers were not finite; see train/nonfinite"
        if self._num_steps:
            return f"all {self._num_steps} steps were skipped, since no rollout had an advantage; see train/skipped and reward/*"
        if 0 <= trainer.max_steps <= step:
            return f"trainer.max_steps={trainer.max_steps} is reached already, at step {step}. Raise it"
        if max_epochs is not None and 0 <= max_epochs <= trainer.current_epoch:
            return f"trainer.max_epochs={max_epochs} is reached already, at epoch {trainer.current_epoch}. Raise it"
        if not trainer.limit_train_batches:
            return f"trainer.limit_train_batches is {trainer.limit_train_batches}. Leave it out"
        return "the run was stopped before its first step"
