"""Settings of a run, for every logger."""

from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from fuchsia_pl.callbacks.access import data_of, module_of


class HyperparameterLog(Callback):
    """Logs objective, sizes, model and optimizer settings to every logger once, when training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the settings. The optimizer exists by now, with the changes of a checkpoint."""
        described = hyperparameters(trainer)
        for logger in trainer.loggers:
            logger.log_hyperparams(described)


def hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Settings for the comparison of runs, as plain data.

    Arguments of environments and engines are left out: they may contain API keys.
    """
    module, data = module_of(trainer), data_of(trainer)
    return {
        "model": asdict(module.policy_config),
        "objective": module.loss_config.resolved(),
        "optimizer": _optimizer(trainer.optimizers[0]),
        "lr_scheduler": next((type(c.scheduler).__name__ for c in trainer.lr_scheduler_configs), None),
        "data": {
            "environment": type(data.environment).__name__,
            "engine": type(data.engine).__name__,
            "batch_size": data.batch_size,
            "steps_per_epoch": data.steps_per_epoch,
            "seed": data.seed,
            "sampling": asdict(data.sampling),
        },
        "trainer": {
            "max_steps": trainer.max_steps,
            "max_epochs": trainer.max_epochs,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "precision": str(trainer.precision),
            "num_ranks": trainer.world_size,
        },
    }


def _optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Class and settings of an optimizer. The learning rate is the initial one, before the schedule."""
    group = optimizer.param_groups[0]
    settings = {name: _plain(value) for name, value in group.items() if name not in ("params", "initial_lr")}
    rate = group.get("initial_lr", group["lr"])  # None if the optimizer computes its own
    return {**settings, "lr": None if rate is None else float(rate), "class": type(optimizer).__name__}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)
