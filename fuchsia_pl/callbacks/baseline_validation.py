"""The held-out figures before training."""

from lightning.pytorch import Callback, LightningModule, Trainer


class BaselineValidation(Callback):
    """Logs what Lightning's sanity check measured as the figures of step 0.

    With `trainer.num_sanity_val_steps: -1` that check is a full validation of the untrained policy, which Lightning itself
    throws away.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands the figures to every logger; those of a few items would not compare with later ones."""
        if trainer.num_sanity_val_steps != float("inf"):
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=0)
