"""What the data module knows of the module and of the trainer's callbacks."""

from typing import Protocol, runtime_checkable

from lightning.pytorch import Trainer

from fuchsia_pl.batch import Batch, RolloutScores


class Scorer(Protocol):
    """The module: it says of rollouts what only the model can."""

    @property
    def shares_prefix(self) -> bool:
        """Whether what siblings have in common is computed once."""

    @property
    def max_tokens_per_micro_batch(self) -> int | None:
        """The budget that decides the number of micro-batches, if there is one."""

    def score_rollouts(self, batches: list[Batch]) -> list[RolloutScores]:
        """KL and values of the tokens of some micro-batches."""


@runtime_checkable
class TurnTaker(Protocol):
    """A callback that lets engine and trainer take turns on one device."""

    def engine_sleeps(self, trainer: Trainer) -> bool:
        """Whether the engine will be asked to sleep; refuses what that does not work with."""


def engine_sleeps(trainer: Trainer) -> bool:
    """Whether a callback of the trainer will let the engine sleep."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(callback.engine_sleeps(trainer) for callback in callbacks if isinstance(callback, TurnTaker))
