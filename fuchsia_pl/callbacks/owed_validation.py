"""Repeats a validation that was cut off by the end of the run before."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop

from fuchsia_pl.callbacks.run_metrics import RunMetrics

HELD_OUT = "validation/"


class OwedValidation(Callback):
    """Validates at the start of a resumed run if a validation is due at its checkpoint's step and is in no log.

    The checkpoint of an epoch's last step is saved before the validation of that step. If a run ends in between, Lightning
    assumes that the validation took place. A run that resumes from its last step would not even start.
    """

    def __init__(self) -> None:
        self._is_resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes Lightning call the hooks of start and end also in a run without steps left."""
        self._is_resumed = False
        if stage == "fit" and not isinstance(trainer.fit_loop, _StartedFitLoop):
            loop = _StartedFitLoop(trainer, trainer.fit_loop.min_epochs, trainer.fit_loop.max_epochs)
            vars(loop).update(vars(trainer.fit_loop))  # its data source and the loops inside it
            trainer.fit_loop = loop

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning calls this only if a run resumes."""
        self._is_resumed = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates as Lightning does after a batch. The metrics are logged at the step of the checkpoint."""
        epoch_loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        if not self._is_resumed or fetcher is None or not epoch_loop._should_check_val_fx(fetcher):
            return
        last_step = trainer.global_step - 1
        if any(_has_validated(logger, last_step) for logger in trainer.loggers):
            return
        # Epoch and step for the loggers. In a checkpoint from the end of a run, both counters are too high.
        epochs = trainer.fit_loop.epoch_progress.current
        completed, num_steps = epochs.completed, epoch_loop._batches_that_stepped
        epochs.completed = last_step * trainer.accumulate_grad_batches // int(trainer.num_training_batches)
        epoch_loop._batches_that_stepped = last_step
        first_loop_iter = trainer._logger_connector._first_loop_iter
        epoch_loop.val_loop.restarting = False
        trainer.validating = True
        epoch_loop.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first_loop_iter
        epochs.completed, epoch_loop._batches_that_stepped = completed, num_steps


class _StartedFitLoop(_FitLoop):
    """Lightning's loop, which calls `on_train_start` and `on_train_end` also if the run has no steps left."""

    @property
    def skip(self) -> bool:
        """Whether there is nothing to train on at all."""
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0


def _has_validated(logger: Any, step: int) -> bool:
    """Whether the rows copied from the earlier run contain held-out metrics of a step."""
    rows = logger.earlier if isinstance(logger, RunMetrics) else ()
    return any(
        row.get("step") == str(step) and any(value and name.startswith(HELD_OUT) for name, value in row.items())
        for row in rows
    )
