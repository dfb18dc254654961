"""Held-out metrics before training."""

from lightning.pytorch import Callback, LightningModule, Trainer


class BaselineValidation(Callback):
    """Logs the metrics of Lightning's sanity check as those of step 0.

    With `trainer.num_sanity_val_steps: -1` the check is a full validation of the untrained policy, whose metrics Lightning
    discards.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the metrics, unless the check covered only some items: later ones would not be comparable."""
        if trainer.num_sanity_val_steps != float("inf"):
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=0)
