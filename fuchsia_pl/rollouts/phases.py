"""Phases of rollouts as a dataset. A phase is sampled when its first batch is requested."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from fuchsia_pl.types import ConfigError


class PhaseDataset(IterableDataset[Any]):
    """Calls a producer once per phase and yields its batches.

    The dataset must have a length. Without one, Lightning fetches a batch ahead, and step k+1 would be sampled with the weights
    of step k.

    Args:
        produce: Returns the batches of one phase.
        num_phases: Phases per epoch.
        batches_per_phase: Number of batches that `produce` returns.
    """

    def __init__(self, produce: Callable[[], list[Any]], num_phases: int, batches_per_phase: int) -> None:
        self.produce = produce
        self.num_phases = num_phases
        self.batches_per_phase = batches_per_phase

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.num_phases * self.batches_per_phase

    def __iter__(self) -> Iterator[Any]:
        """Yields batches. A phase is produced when its first batch is requested."""
        for _ in range(self.num_phases):
            yield from self.produce()


def phase_loader(dataset: PhaseDataset) -> DataLoader[Any]:
    """A loader that yields the dataset's batches one by one, in this process."""
    # A loader draws a seed for its workers at each iteration. Taken from torch's global generator, it would change the dropout
    # of a resumed run, which iterates at other moments.
    return DataLoader(dataset, batch_size=None, num_workers=0, generator=torch.Generator())


def num_phases(trainer: Trainer, steps_per_epoch: int, steps_per_phase: int) -> int | None:
    """Phases of a whole run, None if only `trainer.max_time` limits it.

    Args:
        trainer: Lightning's.
        steps_per_epoch: Optimizer steps of an epoch.
        steps_per_phase: Optimizer steps of a phase.
    """
    limits = []
    if trainer.max_steps > 0:
        limits.append(trainer.max_steps // steps_per_phase)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        num_batches = _batches_per_epoch(trainer, steps_per_epoch)
        limits.append(trainer.max_epochs * num_batches // (trainer.accumulate_grad_batches * steps_per_phase))
    return min(limits, default=None)


def _batches_per_epoch(trainer: Trainer, steps_per_epoch: int) -> int:
    limit, num_batches = trainer.limit_train_batches, steps_per_epoch * trainer.accumulate_grad_batches
    return min(limit, num_batches) if isinstance(limit, int) else int(num_batches * limit)


def check_phases(trainer: Trainer, steps_per_epoch: int, steps_per_phase: int) -> None:
    """Checks that the run and its epochs end at the end of a phase. The arguments are those of `num_phases`.

    Raises:
        ConfigError: One would end within a phase.
    """
    batches_per_phase = trainer.accumulate_grad_batches * steps_per_phase
    num_batches = _batches_per_epoch(trainer, steps_per_epoch)
    if num_batches % batches_per_phase or (trainer.limit_train_batches and not num_batches):
        raise ConfigError(
            f"trainer.limit_train_batches={trainer.limit_train_batches} would cut a phase: it has {batches_per_phase} "
            "micro-batches (trainer.accumulate_grad_batches x model.loss.mini_batches x num_policy_updates); use "
            "data.steps_per_epoch or trainer.max_steps"
        )
    if trainer.max_steps > 0 and trainer.max_steps % steps_per_phase:
        raise ConfigError(
            f"trainer.max_steps={trainer.max_steps} is no multiple of the {steps_per_phase} optimizer steps of a phase "
            "(model.loss.mini_batches x num_policy_updates): the run would end within one"
        )
