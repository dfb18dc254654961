"""An exponential moving average of the trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fuchsia_pl.callbacks.access import callbacks_of, data_of
from fuchsia_pl.policy.contents import AVERAGED_WEIGHTS
from fuchsia_pl.types import ConfigError


class WeightAverage(Callback):
    """Averages the trained weights for held-out metrics and `adapter/`; training continues with the weights themselves.

    After each optimizer step: average = decay * average + (1 - decay) * weights. A checkpoint contains both, so a resumed run
    continues with the same numbers, and `fuchsia validate` evaluates the average. Lightning's own callbacks average a copy of
    the whole model, frozen weights included.

    Args:
        decay: Weight of the previous average, at least 0 and below 1.
        start_step: Up to this optimizer step, the average equals the weights.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, decay: float = 0.99, start_step: int = 0) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"WeightAverage.decay must be at least 0 and below 1, got {decay}")
        if start_step < 0:
            raise ConfigError(f"WeightAverage.start_step must be 0 or more, got {start_step}")
        self.decay = decay
        self.start_step = start_step
        self._module: LightningModule | None = None
        self._average: dict[str, Tensor] = {}
        self._is_swapped = False  # the module has the average, and `_average` the trained weights
        self._step = 0

    def check_run(self, trainer: Trainer) -> None:
        """Checks the settings that an average requires, before the engine starts.

        Raises:
            ConfigError: A setting does not allow an average.
        """
        staleness = data_of(trainer).sampling.max_staleness
        if staleness:
            raise ConfigError(
                f"WeightAverage and data.sampling.max_staleness={staleness}: the engine would sample for training while it has "
                "the averaged weights of a validation. Set max_staleness to 0, or leave the callback out"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
            raise ConfigError(f"WeightAverage does not work with {type(trainer.strategy).__name__}: use ddp")
        if any(checkpoint.save_weights_only for checkpoint in callbacks_of(trainer, ModelCheckpoint)):
            raise ConfigError(
                "ModelCheckpoint.save_weights_only would leave out WeightAverage's average: set it to false"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts from the current weights, the average of a checkpoint, or the last run of the same module.

        Raises:
            ConfigError: The average of the checkpoint has other weights.
        """
        if self._module is not pl_module:
            self._module, self._average, self._is_swapped = pl_module, {}, False
        if self._is_swapped:
            self._swap()
        trained = _trained(pl_module)
        if self._average and self._average.keys() != trained.keys():
            raise ConfigError(
                "the checkpoint averages other weights than this config trains: use the config.yaml of its run"
            )
        self._average = self._average or {name: weight.detach().clone() for name, weight in trained.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the number of the step at which training starts."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average if this micro-batch completed an optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        weights = [weight.detach() for weight in _trained(pl_module).values()]
        decay = 0.0 if self._step <= self.start_step else self.decay
        average = [mean.to(weight.device) for mean, weight in zip(self._average.values(), weights, strict=True)]
        get_ema_multi_avg_fn(decay)(average, weights, None)
        self._average = dict(zip(self._average, average, strict=True))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the average into the module. AdapterSync syncs it afterwards."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the trained weights back into the module."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the average into the module, where it stays."""
        self._swap()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the average and the trained weights, whichever of them the module has."""
        if not self._average:
            return
        in_module = {name: weight.detach() for name, weight in _trained(pl_module).items()}
        weights, average = (self._average, in_module) if self._is_swapped else (in_module, self._average)
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **weights}
        checkpoint[AVERAGED_WEIGHTS] = dict(average)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Loads the average of a checkpoint, if it has one."""
        if trainer.state.fn == TrainerFn.FITTING:
            saved = checkpoint.get(AVERAGED_WEIGHTS, {})
            self._module, self._is_swapped = pl_module, False
            self._average = {name: tensor.clone() for name, tensor in saved.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the average inside the `with` block."""
        swaps = bool(self._average) and not self._is_swapped
        if swaps:
            self._swap()
        try:
            yield
        finally:
            if swaps:
                self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        assert self._module is not None, "on_fit_start comes first"
        for name, weight in _trained(self._module).items():
            kept = weight.detach().clone()
            weight.copy_(self._average[name])
            self._average[name] = kept
        self._is_swapped = not self._is_swapped


def _trained(module: LightningModule) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
