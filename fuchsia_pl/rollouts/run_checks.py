"""Interfaces of the module and the callbacks that the data module uses, checks of a run, and the engine's settings."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fuchsia_pl.batch import Batch, TrainerSignals
from fuchsia_pl.engines.base import EngineSpec, engine_log
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.types import ConfigError, ServedModel

GIB = 2**30
# Share of a GPU that the trainer gets beside an engine that takes what is left, where its memory is not planned.
UNPLANNED_SHARE = 0.5


class SignalSource(Protocol):
    """Interface of the module: quantities that require the model."""

    @property
    def shares_prefix(self) -> bool:
        """Whether the common prefix of siblings is computed once."""

    @property
    def max_tokens_per_micro_batch(self) -> int | None:
        """Budget of tokens that sets the number of micro-batches, None without one."""

    def trainer_signals(self, batches: list[Batch]) -> list[TrainerSignals]:
        """Logprobs, KL and critic values of the tokens of micro-batches."""

    def teacher_logprobs(self, batches: list[Batch]) -> list[Tensor]:
        """Logprobs of micro-batches, [B, T] each, by the teacher's adapter, or without one by the reference."""

    def use_teacher(self, adapter: str | None) -> None:
        """Loads the adapter of a teacher, before the engine starts; None for none.

        Raises:
            ConfigError: The folder holds no adapter for the model.
        """


@runtime_checkable
class SharesDevice(Protocol):
    """A callback that shares one device between engine and trainer."""

    def engine_sleeps(self, trainer: Trainer) -> bool:
        """Whether the engine will sleep. Raises ConfigError for settings that do not allow it."""


@runtime_checkable
class Syncer(Protocol):
    """A callback that loads the trained weights into the engine."""

    def sync(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        """Loads the current weights into the engine unless it has them; returns the duration in seconds."""


@runtime_checkable
class RunChecker(Protocol):
    """A module or a callback with requirements on the rest of a run."""

    def check_run(self, trainer: Trainer) -> None:
        """Raises ConfigError, before the engine starts, if the run does not meet the requirements."""


@runtime_checkable
class PlansMemory(Protocol):
    """A callback that plans the memory of the trainer."""

    def trainer_gb(self, trainer: Trainer, sleeps: bool) -> float:
        """Memory that the trainer needs on its device beside the engine, in GiB, without its CUDA context; 0 on a CPU.

        Args:
            trainer: Lightning's.
            sleeps: Whether the trainer leaves the device while the engine runs. Then it is what stays there.
        """


def _unplanned_gb(trainer: Trainer, sleeps: bool) -> float:
    """Memory that is left for a trainer without a callback that plans it, in GiB."""
    device = trainer.strategy.root_device
    if sleeps or device.type != "cuda":
        return 0.0
    return UNPLANNED_SHARE * torch.cuda.get_device_properties(device).total_memory / GIB


def check_run_setup(trainer: Trainer) -> bool:
    """Calls the checks of the module and of every callback, before the engine starts.

    Returns:
        Whether the engine will sleep.

    Raises:
        ConfigError: No callback syncs the engine, or a check failed.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, Syncer) for callback in callbacks):
        raise ConfigError(
            "the trainer has no AdapterSync, so the engine would never get the trained weights: add "
            "fuchsia_pl.callbacks.adapter_sync.AdapterSync() to its callbacks"
        )
    for part in (trainer.lightning_module, *callbacks):
        if isinstance(part, RunChecker):
            part.check_run(trainer)
    return any(callback.engine_sleeps(trainer) for callback in callbacks if isinstance(callback, SharesDevice))


def engine_spec(
    trainer: Trainer, model: ServedModel, sampling: SamplingConfig, seed: int, sleeps: bool, rewards_gb: float = 0.0
) -> EngineSpec:
    """Settings with which this rank's engine starts.

    Args:
        trainer: Lightning's.
        model: The model.
        sampling: Settings of sampling.
        seed: The run's seed.
        sleeps: Whether a callback puts the engine to sleep. The trainer's weights are then elsewhere while the engine runs.
        rewards_gb: Memory of reward models on the trainer's device, in GiB.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    planners = [callback for callback in callbacks if isinstance(callback, PlansMemory)]
    return EngineSpec(
        model,
        sampling.max_length,
        seed,
        Path(trainer.default_root_dir) / engine_log(trainer.global_rank),
        trainer.world_size,
        trainer.global_rank,
        trainer.local_rank,
        trainer.num_devices,
        trainer.strategy.root_device.index,
        loads_in_flight=sampling.in_flight == "continue",
        sleeps=sleeps,
        max_restarts=sampling.engine_restarts,
        reserved_gb=rewards_gb
        + max((planner.trainer_gb(trainer, sleeps) for planner in planners), default=_unplanned_gb(trainer, sleeps)),
    )
