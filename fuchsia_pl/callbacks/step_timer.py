"""Durations and throughput of a step, and how full its micro-batches are."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.access import module_of, policy_of
from fuchsia_pl.rollouts.ranks import ranks_of


class StepTimer(Callback):
    """Logs `perf/step_seconds` and `perf/train_tokens_per_s` once per optimizer step.

    With a budget of tokens, also `perf/micro_batches`, the number that the rows filled, and `perf/budget_used`.
    """

    def __init__(self) -> None:
        self._step_start = 0.0
        self._train_seconds = 0.0
        self._num_tokens = self._num_computed = self._num_micro_batches = 0
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
        self._num_tokens += sum(len(sample.row.token_ids) for sample in batch.samples)
        self._num_computed += batch.num_computed_tokens(policy_of(trainer).shares_prefix)
        self._num_micro_batches += batch.has_rows
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        counts = torch.tensor([self._num_tokens, self._num_computed])
        num_tokens, num_computed = ranks_of(trainer).add_up(counts).tolist()
        pl_module.log("perf/train_tokens_per_s", num_tokens / self._train_seconds)
        budget = module_of(trainer).max_tokens_per_micro_batch
        if budget is not None:
            pl_module.log("perf/micro_batches", float(self._num_micro_batches))
            total = self._num_micro_batches * trainer.world_size * budget
            pl_module.log("perf/budget_used", num_computed / total)
        pl_module.log("perf/step_seconds", now - self._step_start)
        self._begin_step()

    def _begin_step(self) -> None:
        self._step_start = time.perf_counter()
        self._train_seconds = 0.0
        self._num_tokens = self._num_computed = self._num_micro_batches = 0
