"""Shares one device between engine and trainer: the weights of only one of them are in its memory at a time."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.access import data_of, module_of, policy_of
from fuchsia_pl.loop import run_blocking
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.types import ConfigError

HOST = torch.device("cpu")
# Optimizer state of one weight, the name of a tensor in it, and a name among all optimizers.
Place = tuple[dict[str, Any], str, str]


class DeviceOwner(Enum):
    """The side that has its weights on the device."""

    TRAINER = "trainer"
    ENGINE = "engine"


class HotSwap(Callback):
    """Moves the trainer's weights and optimizer to host memory while the engine samples; otherwise puts the engine to sleep.

    The device then holds the larger of the two and never both: one side is moved off before the other is loaded. The cost is
    the time of the transfers and host memory for the side that is moved off. Frozen weights are copied to the host once, into
    page-locked memory, and only uploaded afterwards; trained weights and optimizer state go both ways. Not tested on a GPU.

    The engine sleeps as soon as it has started, before Lightning moves the model to the device. At the start of a phase the
    trainer is moved to the host and the engine wakes; sync and sampling follow. Before the first micro-batch of the phase the
    engine sleeps and the trainer is moved back. Held-out splits are sampled while the engine owns the device.

    With several ranks, each with a device and an engine of its own, all ranks change the owner together, and a part of the
    trainer stays on the device: with DDP the trained weights, whose gradient hooks a move would remove; with FSDP2, whose
    collectives need device tensors, the rank's shards and their optimizer state.

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
            trainer.strategy.barrier("hotswap")  # a rank may still compute with weights that another rank would move
            if leaves_device(trainer):
                self._moved = move_to_host(policy_of(trainer), trainer.optimizers, HOST, moves_trained(trainer))
            run_blocking(data_of(trainer).engine.wake())
            trainer.strategy.barrier("hotswap")
            self.owner = DeviceOwner.ENGINE

    def to_trainer(self, trainer: Trainer) -> None:
        """Puts the engine to sleep, then moves the trainer to the device. Does nothing if the trainer owns the device."""
        if self.enabled and self.owner is DeviceOwner.ENGINE:
            trainer.strategy.barrier("hotswap")
            run_blocking(data_of(trainer).engine.sleep())
            if leaves_device(trainer):
                device, with_trained = trainer.strategy.root_device, moves_trained(trainer)
                move_to_device(policy_of(trainer), self._moved, device, with_trained)
            trainer.strategy.barrier("hotswap")
            self.owner, self._moved = DeviceOwner.TRAINER, []


def leaves_device(trainer: Trainer) -> bool:
    """Whether anything of the trainer is moved: not with FSDP2, whose collectives work with tensors on the device only."""
    return not isinstance(trainer.strategy, ModelParallelStrategy)


def moves_trained(trainer: Trainer) -> bool:
    """Whether trained weights are moved: not with DDP, whose hooks belong to a weight on its device."""
    return isinstance(trainer.strategy, SingleDeviceStrategy)


def obstacle(trainer: Trainer) -> str | None:
    """The reason why engine and trainer cannot share a device with the settings of a run, None if they can."""
    data = data_of(trainer)
    if not data.engine.can_sleep:
        return f"{type(data.engine).__name__} cannot sleep"
    if data.sampling.max_staleness:
        return f"data.sampling.max_staleness is {data.sampling.max_staleness}: sampling beside training needs both on the device"
    if data.loss.needs_signals or data.teacher is not None:
        return (
            "the objective (advantage gae, a KL in the reward, or a teacher) runs the trainer's model on the rollouts while the "
            "engine owns the device"
        )
    return None


def move_to_host(
    policy: Policy, optimizers: Sequence[Optimizer], host: torch.device, with_trained: bool = True
) -> list[Place]:
    """Moves weights and optimizer state from the device to the host.

    Args:
        policy: Its weights and its reference are moved.
        optimizers: Their state is moved.
        host: Target device.
        with_trained: Whether trained weights and their gradients are moved.

    Returns:
        The tensors of the optimizers that were on the device of their weight. Some optimizers keep others, such as counters, on
        the host.
    """
    states = [
        (f"{number}.{of_weight}", parameter.device, state)
        for number, optimizer in enumerate(optimizers)
        for of_weight, (parameter, state) in enumerate(optimizer.state.items())
    ]
    places = [
        (state, name, f"optimizer.{prefix}.{name}")
        for prefix, device, state in states
        for name, value in state.items()
        if isinstance(value, Tensor) and value.device == device
    ]
    _move(policy, places, host, with_trained)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the engine's process cannot use memory that torch has cached
    return places


def move_to_device(policy: Policy, moved: Sequence[Place], device: torch.device, with_trained: bool = True) -> None:
    """Moves weights, and the optimizer state that `move_to_host` has moved, to the device."""
    _move(policy, moved, device, with_trained)


def _move(policy: Policy, places: Sequence[Place], device: torch.device, with_trained: bool) -> None:
    policy.to_device(device, with_trained)
    for state, name, key in places:
        state[name] = policy.host_copies.moved(key, state[name], device, changes=True)
