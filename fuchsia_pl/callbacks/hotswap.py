"""Shares one device between engine and trainer: the weights of only one of them are in its memory at a time."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.access import data_of, module_of, policy_of
from fuchsia_pl.loop import run_blocking
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.types import ConfigError

HOST = torch.device("cpu")
Place = tuple[dict[str, Any], str]  # optimizer state of one weight, and the name of a tensor in it


class DeviceOwner(Enum):
    """The side that has its weights on the device."""

    TRAINER = "trainer"
    ENGINE = "engine"


class HotSwap(Callback):
    """Moves the trainer's weights and optimizer to host memory while the engine samples; otherwise puts the engine to sleep.

    The device then holds the larger of the two and never both: one side is moved off before the other is loaded. The cost is
    the time of the transfers, twice per phase, and host memory for the side that is moved off. Not tested on a GPU.

    The engine sleeps as soon as it has started, before Lightning moves the model to the device. At the start of a phase the
    trainer is moved to the host and the engine wakes; sync and sampling follow. Before the first micro-batch of the phase the
    engine sleeps and the trainer is moved back. Held-out splits are sampled while the engine owns the device.

    Args:
        enabled: False keeps both on the device.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self.owner = DeviceOwner.ENGINE
        self._moved: list[Place] = []

    def engine_sleeps(self, trainer: Trainer) -> bool:
        """Whether this callback will call `Engine.sleep`. The data module calls this before it starts the engine.

        Raises:
            ConfigError: The run's settings do not allow a shared device.
        """
        reason = obstacle(trainer) if self.enabled else None
        if reason is not None:
            raise ConfigError(f"hotswap.enabled is true, but {reason}: set it to false")
        return self.enabled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the engine to sleep: it has started, and the model is not on the device yet."""
        if self.enabled:
            run_blocking(data_of(trainer).engine.sleep())
            self.owner, self._moved = DeviceOwner.TRAINER, []

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the device to the trainer, for the rehearsal of Preflight."""
        self.to_trainer(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the device to the engine, which samples the first phase next."""
        self.to_engine(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the device to the engine, which samples the held-out split, possibly within a phase."""
        self.to_engine(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the device to the engine: `fuchsia test` only samples."""
        self.to_engine(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the device to the engine: `fuchsia predict` only samples."""
        self.to_engine(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Gives the device to the trainer: the phase has been sampled."""
        self.to_trainer(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Gives the device to the engine after the last optimizer step of a phase."""
        if self.enabled and module_of(trainer).ends_phase(batch_idx):
            for optimizer in trainer.optimizers:
                optimizer.zero_grad(set_to_none=True)  # Lightning frees used gradients only before the next backward
            self.to_engine(trainer)

    def to_engine(self, trainer: Trainer) -> None:
        """Moves the trainer to the host, then wakes the engine. Does nothing if the engine owns the device."""
        if self.enabled and self.owner is DeviceOwner.TRAINER:
            self._moved = move_to_host(policy_of(trainer), trainer.optimizers, HOST)
            run_blocking(data_of(trainer).engine.wake())
            self.owner = DeviceOwner.ENGINE

    def to_trainer(self, trainer: Trainer) -> None:
        """Puts the engine to sleep, then moves the trainer to the device. Does nothing if the trainer owns the device."""
        if self.enabled and self.owner is DeviceOwner.ENGINE:
            run_blocking(data_of(trainer).engine.sleep())
            move_to_device(policy_of(trainer), self._moved, trainer.strategy.root_device)
            self.owner, self._moved = DeviceOwner.TRAINER, []


def obstacle(trainer: Trainer) -> str | None:
    """The reason why engine and trainer cannot share a device with the settings of a run, None if they can."""
    data = data_of(trainer)
    if not data.engine.can_sleep:
        return f"{type(data.engine).__name__} cannot sleep"
    if trainer.world_size > 1:
        return f"there are {trainer.world_size} ranks, and a shared device allows one engine and one trainer only"
    if data.sampling.max_staleness:
        return f"data.sampling.max_staleness is {data.sampling.max_staleness}: sampling beside training needs both on the device"
    if data.loss.needs_signals:
        return (
            "the objective (advantage gae, or a KL in the reward) runs the trainer's model on the rollouts while the engine "
            "owns the device"
        )
    return None


def move_to_host(policy: Policy, optimizers: Sequence[Optimizer], host: torch.device) -> list[Place]:
    """Moves weights and optimizer state from the device to the host.

    Returns:
        The tensors of the optimizers that were on the device of their weight. Some optimizers keep others, such as counters, on
        the host.
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
        torch.cuda.empty_cache()  # the engine's process cannot use memory that torch has cached
    return moved


def move_to_device(policy: Policy, moved: Sequence[Place], device: torch.device) -> None:
    """Moves weights, and the optimizer state that `move_to_host` has moved, to the device."""
    _move(policy, moved, device)


def _move(policy: Policy, places: Sequence[Place], device: torch.device) -> None:
    policy.to_device(device)
    for state, name in places:
        state[name] = state[name].to(device)
