"""The metrics of the step after which a checkpoint is saved."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage

ROW_KEY = "metrics_row"


class LastRow(Callback):
    """Puts the row that a step is about to log into its checkpoint.

    Lightning hands a step's metrics to the loggers after the hook in which the checkpoint is saved. A run that is killed in
    between has a checkpoint of a step of which no log holds the metrics; the run that resumes it takes them from here.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the row where a step is being trained; between steps, in validation and at the end it is logged already."""
        connector, step = trainer._logger_connector, trainer.fit_loop.epoch_loop._batches_that_stepped
        is_in_step = trainer.state.stage == RunningStage.TRAINING and connector._first_loop_iter is not None
        if trainer.loggers and is_in_step and step < trainer.global_step and connector.should_update_logs:
            metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
            checkpoint[ROW_KEY] = {**metrics, "epoch": trainer.current_epoch, "step": step}
