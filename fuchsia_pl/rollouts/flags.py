"""Lightning's settings: limits that count steps and items here, and values that are refused."""

from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from fuchsia_pl.types import ConfigError

HELD_OUT_FLAGS = {
    "fit": "limit_val_batches",
    "validate": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


@dataclass(frozen=True)
class Limits:
    """Numbers of items and steps of a run. Lightning itself counts micro-batches, and a held-out split is one micro-batch.

    Attributes:
        steps_per_epoch: Optimizer steps of an epoch.
        num_repeated_phases: Number of phases whose items are repeated; None draws new items in every phase.
        held_out: Number (int) or share (float) of the held-out items that are used; 0 uses none.
        flag: The setting that limits held-out items.
        given: Its value.
        validation_steps: Optimizer steps between two validations; None validates at the end of an epoch.
        given_interval: Value of `trainer.val_check_interval` if that is replaced by `validation_steps`, else None.

    >>> limits = Limits(steps_per_epoch=3, num_repeated_phases=2, held_out=0.5, flag="limit_val_batches", given=0.5)
    >>> [limits.drawn_phase(phase) for phase in range(5)], limits.first_held_out([7, 8, 9], num_ranks=1)
    ([0, 1, 0, 1, 0], [7])
    """

    steps_per_epoch: int
    num_repeated_phases: int | None
    held_out: int | float
    flag: str
    given: int | float
    validation_steps: int | None = None
    given_interval: int | float | None = None

    def drawn_phase(self, phase: int) -> int:
        """Number of the phase that determines the drawn items."""
        return phase if self.num_repeated_phases is None else phase % self.num_repeated_phases

    def first_held_out(self, positions: list[int], num_ranks: int) -> list[int]:
        """The held-out items that are used.

        Raises:
            ConfigError: There are fewer of them than ranks.
        """
        num_all = len(positions)
        number = min(self.held_out, num_all) if isinstance(self.held_out, int) else int(self.held_out * num_all)
        if number < num_ranks:
            raise ConfigError(
                f"trainer.{self.flag}={self.held_out} takes {number} of {num_all} held-out items for {num_ranks} rank(s): a "
                "whole number counts items, and a number up to 1.0 is a share of them. Raise it"
            )
        return positions[:number]


def take_limits(trainer: Trainer, stage: str, steps_per_epoch: int, steps_per_phase: int, batch_size: int) -> Limits:
    """Reads the trainer's limits and removes them from it, because it would count micro-batches. `return_limits` undoes this.

    Args:
        trainer: Lightning's.
        stage: "fit", "validate", "test" or "predict".
        steps_per_epoch: Optimizer steps between two validations.
        steps_per_phase: Optimizer steps of a phase.
        batch_size: Items of a phase.

    Raises:
        ConfigError: A limit cannot be applied.
    """
    flag = HELD_OUT_FLAGS[stage]
    held_out = given = getattr(trainer, flag)
    num_repeated = None
    if stage == "fit" and trainer.overfit_batches:  # type: ignore[attr-defined]
        steps = _overfitted_steps(trainer, steps_per_epoch, steps_per_phase)
        num_repeated = steps // steps_per_phase
        held_out = num_repeated * batch_size
        trainer.limit_train_batches = 1.0
    num_phases = int(trainer.fast_dev_run)  # type: ignore[attr-defined]
    if num_phases:
        held_out = num_phases * trainer.world_size
        steps_per_epoch = num_phases * steps_per_phase
        trainer.fit_loop.epoch_loop.max_steps = steps_per_epoch
        trainer.limit_train_batches = 1.0
    validation_steps = None
    if stage == "fit" and held_out:
        validation_steps = _validation_steps(trainer, steps_per_epoch, steps_per_phase)
    if stage != "fit" and not held_out:
        raise ConfigError(
            f"trainer.{flag}=0 leaves nothing to do for `{TrainerFn(stage).value}`: leave it out, or raise it"
        )
    setattr(trainer, flag, 1.0 if held_out else 0)
    return Limits(
        steps_per_epoch,
        num_repeated,
        held_out,
        flag,
        given,
        validation_steps,
        given_interval=None if validation_steps is None else trainer.val_check_interval,
    )


def return_limits(trainer: Trainer, limits: Limits) -> None:
    """Restores the limits that `take_limits` removed, for the next run of the same trainer."""
    setattr(trainer, limits.flag, limits.given)
    if limits.given_interval is not None:
        trainer.val_check_interval = limits.given_interval


def count_micro_batches(trainer: Trainer, limits: Limits) -> None:
    """Sets the interval of validations in micro-batches, as Lightning counts them, before it reads the interval."""
    if limits.validation_steps is not None:
        trainer.val_check_interval = limits.validation_steps * trainer.accumulate_grad_batches


def check_settings(trainer: Trainer) -> None:
    """Checks, before an engine starts, settings of the trainer that would change what is trained.

    Raises:
        ConfigError: A setting is not supported.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            raise ConfigError(
                "GradientAccumulationScheduler would cut optimizer steps: set trainer.accumulate_grad_batches"
            )
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ConfigError(
                f"{type(callback).__name__} averages a copy of the whole model, which reaches neither the engine nor the "
                "adapter: use fuchsia_pl.callbacks.weight_average.WeightAverage, which averages the trained weights"
            )
    precision = trainer.precision
    if precision not in PRECISIONS:
        reason = (
            "float64 would be given to the frozen weights too, and no engine samples in it"
            if precision == "64-true"
            else "the trained weights would not be float32, in which small updates are kept"
        )
        raise ConfigError(
            f"trainer.precision={precision!r}: {reason}. Use 32-true or bf16-mixed (frozen weights have model.policy.dtype "
            "either way)"
        )


def _overfitted_steps(trainer: Trainer, steps_per_epoch: int, steps_per_phase: int) -> int:
    given = trainer.overfit_batches  # type: ignore[attr-defined]
    steps = given if isinstance(given, int) else int(given * steps_per_epoch)
    if steps < 1 or steps % steps_per_phase:
        raise ConfigError(
            f"trainer.overfit_batches={given} is {steps} optimizer steps (a number up to 1.0 is a share of "
            f"data.steps_per_epoch={steps_per_epoch}), and must be a multiple of the {steps_per_phase} optimizer steps of a "
            "phase (model.loss.mini_batches x num_policy_updates)"
        )
    return steps


def _validation_steps(trainer: Trainer, steps_per_epoch: int, steps_per_phase: int) -> int | None:
    """Optimizer steps between two validations by `trainer.val_check_interval`; None for the end of each epoch.

    Raises:
        ConfigError: It is a time, it is longer than an epoch, or a validation would be within a phase or a step.
    """
    time_s = trainer._val_check_time_interval  # type: ignore[attr-defined]
    if time_s is not None:
        raise ConfigError(
            f"trainer.val_check_interval={time_s:g} s would validate within an optimizer step: give a number of optimizer "
            "steps, or a share of an epoch (data.steps_per_epoch)"
        )
    interval = trainer.val_check_interval  # Lightning sets it only if the interval is no time
    if not isinstance(interval, int) and interval == 1.0:
        return None
    steps = interval if isinstance(interval, int) else interval * steps_per_epoch
    if abs(steps - round(steps)) > 1e-6 or round(steps) < 1 or round(steps) % steps_per_phase:
        raise ConfigError(
            f"trainer.val_check_interval={interval} is {steps:g} optimizer steps (a whole number counts steps, a number up to "
            f"1.0 is a share of data.steps_per_epoch={steps_per_epoch}), and must be a multiple of the {steps_per_phase} "
            "optimizer steps of a phase (model.loss.mini_batches x num_policy_updates)"
        )
    if trainer.check_val_every_n_epoch is not None and steps > steps_per_epoch:
        raise ConfigError(
            f"trainer.val_check_interval={interval} is more optimizer steps than an epoch has, "
            f"data.steps_per_epoch={steps_per_epoch}: lower it, or set trainer.check_val_every_n_epoch to null to "
            "count over epochs"
        )
    return round(steps)
