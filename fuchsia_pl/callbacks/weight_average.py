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
    """Held-out figures and `adapter/` are of an average of the trained weights; training goes on from the weights themselves.

    After each optimizer step: average = decay * average + (1 - decay) * weights. A checkpoint holds both, so that a resumed run
    goes on as if it had never stopped, and `fuchsia validate` reports the average. Lightning's own callbacks average a copy of
    the whole model, frozen weights included.

    Args:
        decay: Weight of the average so far, at least 0 and below 1.
        start_step: Optimizer step up to which the average is the weights themselves.

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
        self._is_swapped = False  # the module has the average, and `_average` the weights that learn
        self._step = 0

    def check_run(self, trainer: Trainer) -> None:
        """Refuses, before the engine starts, what an average does not work with.

        Raises:
            ConfigError: There is such a setting.
        """
        staleness = data_of(trainer).sampling.max_staleness
        if staleness:
            raise ConfigError(
                f"WeightAverage and data.sampling.max_staleness={staleness}: the engine would sample for training while it has "
                "the average for validation. Set max_staleness to 0, or leave the callback out"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
            raise ConfigError(f"WeightAverage does not work with {type(trainer.strategy).__name__}: use ddp")
        if any(checkpoint.save_weights_only for checkpoint in callbacks_of(trainer, ModelCheckpoint)):
            raise ConfigError(
                "ModelCheckpoint.save_weights_only would leave out WeightAverage's average: set it to false"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts from the weights at hand, from a checkpoint's average, or from the last run of the same module.

        Raises:
            ConfigError: The checkpoint's average is of other weights.
        """
        if self._module is not pl_module:
            self._module, self._average, self._is_swapped = pl_module, {}, False
        if self._is_swapped:
            self._swap()
        trained = _trained(pl_module)
        if self._average and self._average.keys() != trained.keys():
            raise ConfigError(
                "the checkpoint's averaged weights are not those that this config trains: use its config.yaml"
            )
        self._average = self._average or {name: weight.detach().clone() for name, weight in trained.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts from the step that a checkpoint ends at."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the average where this micro-batch completed an optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        weights = [weight.detach() for weight in _trained(pl_module).values()]
        decay = 0.0 if self._step <= self.start_step else self.decay
        average = [mean.to(weight.device) for mean, weight in zip(self._average.values(), weights, strict=True)]
        get_ema_multi_avg_fn(decay)(average, weights, None)
        self._average = dict(zip(self._average, average, strict=True))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average takes the weights' place; AdapterSync syncs after that."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The weights come back."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the average in the module."""
        self._swap()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the average beside the weights that learn, whichever of them the module has."""
        if not self._average:
            return
        in_module = {name: weight.detach() for name, weight in _trained(pl_module).items()}
        weights, average = (self._average, in_module) if self._is_swapped else (in_module, self._average)
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **weights}
        checkpoint[AVERAGED_WEIGHTS] = dict(average)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Takes a checkpoint's average, if it has one."""
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
