"""A phase of rollouts as a dataset, sampled when its first batch is asked for and not before."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from fuchsia_pl.types import ConfigError


class PhaseDataset(IterableDataset[Any]):
    """Calls a producer once per phase and hands out what it makes.

    It has a length on purpose: without one Lightning fetches a batch ahead, and step k+1 would be sampled with the weights
    of step k.

    Args:
        produce: Makes the batches of one phase.
        num_phases: Phases per epoch.
        batches_per_phase: Batches that `produce` makes.
    """

    def __init__(self, produce: Callable[[], list[Any]], num_phases: int, batches_per_phase: int) -> None:
        self.produce = produce
        self.num_phases = num_phases
        self.batches_per_phase = batches_per_phase

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.num_phases * self.batches_per_phase

    def __iter__(self) -> Iterator[Any]:
        """Produces a phase only when its first batch is asked for."""
        for _ in range(self.num_phases):
            yield from self.produce()


def phase_loader(dataset: PhaseDataset) -> DataLoader[Any]:
    """Hands out what the dataset makes, one batch at a time, in this process."""
    # A loader draws a seed for its workers whenever it is iterated. From torch's global generator that would make a resumed
    # run, which iterates at another moment, drop out other activations than the run it resumes.
    return DataLoader(dataset, batch_size=None, num_workers=0, generator=torch.Generator())


def num_phases(trainer: Trainer, steps_per_epoch: int, num_updates: int) -> int | None:
    """Phases of a whole run, None where it has no end but `trainer.max_time`.

    Args:
        trainer: With the run's steps or epochs.
        steps_per_epoch: Optimizer steps of an epoch.
        num_updates: Optimizer steps of a phase.
    """
    limits = []
    if trainer.max_steps > 0:
        limits.append(trainer.max_steps // num_updates)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        num_batches = _batches_per_epoch(trainer, steps_per_epoch)
        limits.append(trainer.max_epochs * num_batches // (trainer.accumulate_grad_batches * num_updates))
    return min(limits, default=None)


def _batches_per_epoch(trainer: Trainer, steps_per_epoch: int) -> int:
    limit, num_batches = trainer.limit_train_batches, steps_per_epoch * trainer.accumulate_grad_batches
    return min(limit, num_batches) if isinstance(limit, int) else int(num_batches * limit)


def check_phases(trainer: Trainer, steps_per_epoch: int, num_updates: int) -> None:
    """Refuses a run that would end, or begin an epoch, within a phase; for the arguments see `num_phases`.

    Raises:
        ConfigError: It would.
    """
    batches_per_phase = trainer.accumulate_grad_batches * num_updates
    num_batches = _batches_per_epoch(trainer, steps_per_epoch)
    if num_batches % batches_per_phase or (trainer.limit_train_batches and not num_batches):
        raise ConfigError(
            f"trainer.limit_train_batches={trainer.limit_train_batches} would cut a phase: it has {batches_per_phase} "
            "micro-batches (trainer.accumulate_grad_batches x model.loss.num_policy_updates); use data.steps_per_epoch or "
            "trainer.max_steps"
        )
    if trainer.max_steps > 0 and trainer.max_steps % num_updates:
        raise ConfigError(
            f"trainer.max_steps={trainer.max_steps} is no multiple of model.loss.num_policy_updates={num_updates}: the run "
            "would end within a phase"
        )
