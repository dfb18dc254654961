"""Metrics of the last step in its checkpoint."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage

ROW_KEY = "metrics_row"


class LastRow(Callback):
    """Adds the metrics row that a step is about to log to its checkpoint.

    Lightning logs the metrics of a step after the hook that saves the checkpoint. If a run is killed between the two, no log
    contains the metrics of the last step, and the resumed run reads them from the checkpoint.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the row during a training step. Between steps, in validation and at the end the row is already logged."""
        connector, step = trainer._logger_connector, trainer.fit_loop.epoch_loop._batches_that_stepped
        is_in_step = trainer.state.stage == RunningStage.TRAINING and connector._first_loop_iter is not None
        if trainer.loggers and is_in_step and step < trainer.global_step and connector.should_update_logs:
            metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
            checkpoint[ROW_KEY] = {**metrics, "epoch": trainer.current_epoch, "step": step}
