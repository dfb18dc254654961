"""Learning rate schedules: those of transformers by name, and the configuration that Lightning needs for any schedule."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

from fuchsia_pl.policy.optimization import advance
from fuchsia_pl.types import ConfigError

# These two depend on a metric that the trainer of transformers passes to them.
WATCHING = ("reduce_lr_on_plateau", "greedy")
NAMES = tuple(kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION if kind.value not in WATCHING)
HELD_OUT = "validation/"
MAX_STEPS_TRIED = 10_000


class TransformersSchedule(LambdaLR):
    """A schedule of transformers by its name, such as "cosine": warm-up, then half a cosine down to 0.

    Args:
        optimizer: The optimizer whose learning rates are scheduled.
        name: One of transformers' `SchedulerType`.
        num_warmup_steps: Optimizer steps over which the rate rises from 0.
        num_training_steps: Optimizer steps of the whole schedule; None for schedules without an end.
        options: Further arguments of the schedule, such as `num_cycles` or `min_lr_rate`.

    Raises:
        ConfigError: The name is unknown, or an argument is missing or unknown.

    >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = TransformersSchedule(optimizer, "cosine", num_warmup_steps=2, num_training_steps=4)
    >>> rates = []
    >>> for _ in range(4):
    ...     rates += [round(value, 3) for value in schedule.get_last_lr()]
    ...     optimizer.step()
    ...     schedule.step()
    >>> rates
    [0.0, 0.5, 1.0, 0.5]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        name: str,
        num_warmup_steps: int = 0,
        num_training_steps: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if name not in NAMES:
            watching = "lightning.pytorch.cli.ReduceLROnPlateau, which takes the metric as its monitor"
            right = watching if name in WATCHING else f"one of {', '.join(NAMES)}"
            raise ConfigError(
                f"model.lr_scheduler has name={name!r}, which does not depend on steps alone: use {right}"
            )
        # Building a schedule steps it once and so changes its optimizer; the factors are therefore taken from a stand-in.
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": group["lr"]} for group in optimizer.param_groups]
        stand_in = torch.optim.SGD(groups, lr=optimizer.defaults["lr"])
        try:
            made = get_scheduler(name, stand_in, num_warmup_steps, num_training_steps, options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.lr_scheduler {name!r}: {error}") from error
        super().__init__(optimizer, made.lr_lambdas)


def lightning_config(scheduler: LRScheduler, trainer: Trainer) -> dict[str, Any]:
    """The configuration of a scheduler for Lightning.

    A scheduler steps once per optimizer step; one that monitors a held-out metric steps after each validation.

    Args:
        scheduler: The scheduler.
        trainer: The trainer; its interval of validations is used.

    Raises:
        ConfigError: It depends on a metric and has no `monitor`, or it monitors a held-out metric in a run without validation.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "step"}
    if not isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            f"model.lr_scheduler is {type(scheduler).__module__}.{type(scheduler).__name__}, which has no `monitor`: use "
            "lightning.pytorch.cli.ReduceLROnPlateau with init_args.monitor, such as reward/mean"
        )
    config = {"scheduler": scheduler, "monitor": scheduler.monitor}
    if not scheduler.monitor.startswith(HELD_OUT):
        return {**config, "interval": "step"}
    if not trainer.limit_val_batches:
        raise ConfigError(
            f"model.lr_scheduler monitors {scheduler.monitor}, but trainer.limit_val_batches is 0: monitor a metric of training, "
            "such as reward/mean, or enable validation"
        )
    # Lightning does not set the attribute for a time, which the data module refuses.
    interval = vars(trainer).get("val_check_interval", 1.0)
    if interval != 1.0 or isinstance(interval, int):
        raise ConfigError(
            f"model.lr_scheduler monitors {scheduler.monitor} and steps at the end of epochs, but trainer.val_check_interval is "
            f"{interval}: leave it out, and set data.steps_per_epoch to the steps between two validations"
        )
    return {**config, "interval": "epoch", "frequency": trainer.check_val_every_n_epoch or 1}


def check_optimization(
    make_optimizer: Callable[[Iterable[Any]], Optimizer],
    make_scheduler: Callable[[Optimizer], LRScheduler] | None,
    trainer: Trainer,
) -> None:
    """Builds optimizer and scheduler for a stand-in weight, so that wrong arguments are found before the engine starts.

    Args:
        make_optimizer: Builds the optimizer from weights.
        make_scheduler: Builds the scheduler from an optimizer.
        trainer: Lightning's trainer.

    Raises:
        ConfigError: One of them rejects its arguments, or the schedule has fewer steps than the run.
    """
    part = "optimizer"
    try:
        optimizer = make_optimizer([nn.Parameter(torch.zeros(2, 2))])
        part = "lr_scheduler"
        if make_scheduler is not None:
            scheduler = make_scheduler(optimizer)
            lightning_config(scheduler, trainer)
            if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                # Some schedules raise after their last step.
                advance(scheduler, min(trainer.max_steps, MAX_STEPS_TRIED))
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.{part} cannot be made from its settings: {error}") from error
