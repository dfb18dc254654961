"""One device for both: engine and trainer take turns on it."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.access import data_of, module_of, policy_of
from fuchsia_pl.engines.base import Engine
from fuchsia_pl.loop import run_blocking
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.types import ConfigError

HOST = torch.device("cpu")
Place = tuple[dict[str, Any], str]  # an optimizer's state of one weight, and the name of a tensor in it


class DeviceOwner(Enum):
    """Whose weights are on the device."""

    TRAINER = "trainer"
    ENGINE = "engine"


class HotSwap(Callback):
    """Lets the trainer's weights and optimizer wait in the host's memory while the engine samples, and the engine sleep else.

    The device then holds the larger of the two and never both: who has it leaves before the other comes. It costs the time of
    the moves, twice per phase of rollouts, and as much of the host's memory as waits there. Untested on a GPU.

    The order: the engine falls asleep as soon as it has started, before the model comes to the device. A phase begins with the
    trainer leaving and the engine waking; the sync and the sampling follow. Before the phase's first micro-batch the engine
    falls asleep and the trainer comes back. Held-out splits are sampled in the engine's turn.

    Args:
        enabled: Off leaves both on the device.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self.owner = DeviceOwner.ENGINE
        self._moved: list[Place] = []

    def engine_sleeps(self, trainer: Trainer) -> bool:
        """Whether the engine will be asked to sleep. The data module asks before it starts one.

        Raises:
            ConfigError: Taking turns does not work with these settings.
        """
        reason = obstacle(trainer) if self.enabled else None
        if reason is not None:
            raise ConfigError(f"hotswap.enabled is true, but {reason}: set it to false")
        return self.enabled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The engine has started and the model is not on the device yet."""
        if self.enabled:
            run_blocking(_engine(trainer).sleep())
            self.owner, self._moved = DeviceOwner.TRAINER, []

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A preflight comes next."""
        self.to_trainer(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first phase is sampled next."""
        self.to_engine(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Held-out splits are sampled, possibly within a phase."""
        self.to_engine(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`fuchsia test` only samples."""
        self.to_engine(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`fuchsia predict` only samples."""
        self.to_engine(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """The phase has been sampled."""
        self.to_trainer(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """The next phase is sampled after the last step on this one."""
        if self.enabled and module_of(trainer).ends_phase(batch_idx):
            for optimizer in trainer.optimizers:
                optimizer.zero_grad(set_to_none=True)  # used up: Lightning would do so before the next backward
            self.to_engine(trainer)

    def to_engine(self, trainer: Trainer) -> None:
        """The trainer leaves the device, then the engine wakes, unless it is the engine's turn."""
        if self.enabled and self.owner is DeviceOwner.TRAINER:
            self._moved = leave(policy_of(trainer), trainer.optimizers, HOST)
            run_blocking(_engine(trainer).wake())
            self.owner = DeviceOwner.ENGINE

    def to_trainer(self, trainer: Trainer) -> None:
        """The engine falls asleep, then the trainer comes back to the device, unless it is the trainer's turn."""
        if self.enabled and self.owner is DeviceOwner.ENGINE:
            run_blocking(_engine(trainer).sleep())
            come_back(policy_of(trainer), self._moved, trainer.strategy.root_device)
            self.owner, self._moved = DeviceOwner.TRAINER, []


def obstacle(trainer: Trainer) -> str | None:
    """Why engine and trainer cannot take turns with a run's settings, None if they can."""
    data = data_of(trainer)
    if not data.engine.can_sleep:
        return f"{type(data.engine).__name__} cannot sleep"
    if trainer.world_size > 1:
        return f"there are {trainer.world_size} ranks, and only an engine and a trainer that are alone on a device take turns"
    if data.sampling.max_staleness:
        return f"data.sampling.max_staleness is {data.sampling.max_staleness}: sampling beside training needs both on the device"
    if data.loss.needs_signals:
        return (
            "the objective (advantage gae, or a KL in the reward) asks the trainer about rollouts in the middle of the "
            "engine's turn"
        )
    return None


def leave(policy: Policy, optimizers: Sequence[Optimizer], host: torch.device) -> list[Place]:
    """Moves weights and optimizer state off the device.

    Returns:
        Which of the optimizers' tensors were where their weight was. Some optimizers keep others, like counters, on the host.
    """
    states = [(parameter.device, state) for optimizer in optimizers for parameter, state in optimizer.state.items()]
    moved = [
        (state, name)
        for device, state in states
        for name, value in state.items()
        if isinstance(value, Tensor) and value.device == device
    ]
    _move(policy, moved, host)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what torch keeps for itself the engine's process cannot have
    return moved


def come_back(policy: Policy, moved: Sequence[Place], device: torch.device) -> None:
    """Moves the weights back to the device, and the optimizer state that `leave` took off it."""
    _move(policy, moved, device)


def _move(policy: Policy, places: Sequence[Place], device: torch.device) -> None:
    policy.to_device(device)
    for state, name in places:
        state[name] = state[name].to(device)


def _engine(trainer: Trainer) -> Engine:
    return data_of(trainer).engine
