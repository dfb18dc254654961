"""Durations and throughput of a step."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.batch import Batch


class StepTimer(Callback):
    """Logs `perf/step_seconds` and `perf/train_tokens_per_s` once per optimizer step."""

    def __init__(self) -> None:
        self._step_start = 0.0
        self._train_seconds = 0.0
        self._num_tokens = 0
        self._batch_start = 0.0
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of the first step."""
        self._last_step = trainer.global_step
        self._begin_step()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Starts the clock of a micro-batch."""
        self._batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Adds the duration of a micro-batch. After the last of a step, which includes the update, it logs the step."""
        now = time.perf_counter()
        self._train_seconds += now - self._batch_start
        self._num_tokens += sum(len(sample.rollout.token_ids) for sample in batch.samples)
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        num_tokens = torch.tensor(float(self._num_tokens), device=trainer.strategy.root_device)
        num_tokens = trainer.strategy.reduce(num_tokens, reduce_op="sum")
        pl_module.log("perf/train_tokens_per_s", float(num_tokens) / self._train_seconds)
        pl_module.log("perf/step_seconds", now - self._step_start)
        self._begin_step()

    def _begin_step(self) -> None:
        self._step_start = time.perf_counter()
        self._train_seconds = 0.0
        self._num_tokens = 0
