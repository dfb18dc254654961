"""Repeats a validation that was cut off by the end of the run before."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop

from fuchsia_pl.callbacks.run_metrics import Row, RunMetrics

HELD_OUT = "validation/"


class OwedValidation(Callback):
    """Validates at the start of a resumed run if a validation is due at its checkpoint's step and not in `metrics.csv`.

    The checkpoint of an epoch's last step is saved before the validation of that step. If a run ends in between, Lightning
    assumes that the validation took place. A run that resumes from its last step would not even start. Without RunMetrics, the
    logger of the command, it is unknown what the run before has logged, and nothing is validated.
    """

    def __init__(self) -> None:
        self._is_resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets a run without steps left start and end as others do, with all hooks."""
        self._is_resumed = False
        if stage == "fit" and not isinstance(trainer.fit_loop, _StartedFitLoop):
            loop = _StartedFitLoop(trainer, trainer.fit_loop.min_epochs, trainer.fit_loop.max_epochs)
            vars(loop).update(vars(trainer.fit_loop))  # its data source and the loops inside it
            trainer.fit_loop = loop

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning calls this for a run that resumes only."""
        self._is_resumed = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates as Lightning does after the last batch of the checkpoint's step."""
        fetcher = trainer.fit_loop._data_fetcher
        # A checkpoint from the end of a run was saved after the validation, and its counters are one step ahead.
        is_before = trainer.fit_loop.epoch_loop._batches_that_stepped < trainer.global_step
        if not self._is_resumed or fetcher is None or not is_before:
            return
        # What Lightning and the loggers take for the current epoch and step. A checkpoint may be ahead of both.
        epochs, epoch_loop = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop
        completed, num_steps = epochs.completed, epoch_loop._batches_that_stepped
        last_step = trainer.global_step - 1
        epochs.completed = last_step * trainer.accumulate_grad_batches // int(trainer.num_training_batches)
        epoch_loop._batches_that_stepped = last_step
        # Only the first rank has the rows of the run before.
        if epoch_loop._should_check_val_fx(fetcher) and trainer.strategy.broadcast(
            _lacks_validation(trainer, last_step)
        ):
            first_loop_iter = trainer._logger_connector._first_loop_iter
            epoch_loop.val_loop.restarting = False
            trainer.validating = True
            epoch_loop.val_loop.run()
            trainer.training = True
            trainer._logger_connector._first_loop_iter = first_loop_iter
        epochs.completed, epoch_loop._batches_that_stepped = completed, num_steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the step of the loggers at the first batch after a resume.

        Lightning counts a step twice if a run resumes from a checkpoint of the last step before a validation.
        """
        if self._is_resumed:
            self._is_resumed = False
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class _StartedFitLoop(_FitLoop):
    """Lightning's loop, which calls `on_train_start` and `on_train_end` also if a resumed run has no steps left."""

    @property
    def skip(self) -> bool:
        """Whether there is nothing to train on and nothing to make up for."""
        if self.trainer.global_step == 0:
            return super().skip
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0


def _lacks_validation(trainer: Trainer, step: int) -> bool:
    """Whether the run has a `metrics.csv`, and the rows taken over from the run before have no held-out figures of a step."""
    logs = [logger for logger in trainer.loggers if isinstance(logger, RunMetrics)]
    return bool(logs) and not any(_has_figures(row, step) for log in logs for row in log.earlier)


def _has_figures(row: Row, step: int) -> bool:
    return row.get("step") == str(step) and any(value and name.startswith(HELD_OUT) for name, value in row.items())
