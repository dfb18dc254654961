"""The DataModule: each optimizer step's items become rollouts, groups, advantages and micro-batches."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from fuchsia_pl.engines.base import Engine, EngineSpec
from fuchsia_pl.envs.base import Environment, check_environment
from fuchsia_pl.rollouts.addressing import item_indices
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches, make_groups, make_samples
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.metrics import SUMMED_METRICS, reward_metrics, step_metrics
from fuchsia_pl.types import Batch, ConfigError, Denominators, Evaluation, ServedModel

ENGINE_LOG = "engine.log"


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


class RolloutDataModule(LightningDataModule):
    """Samples what is trained on.

    Args:
        environment: What is asked and how answers are scored.
        engine: Who samples.
        served_model: What trainer and engine share; the CLI takes it from the model.
        sampling: How rollouts are sampled.
        batch_size: Items of one optimizer step, over all ranks; each becomes `sampling.group_size` rollouts.
        steps_per_epoch: Optimizer steps between two validations.
        seed: The run's seed; the CLI takes it from `seed_everything`.

    Raises:
        ConfigError: A size is below 1, or the environment could not be trained on.
    """

    def __init__(
        self,
        environment: Environment,
        engine: Engine,
        served_model: ServedModel,
        sampling: SamplingConfig,
        batch_size: int = 8,
        steps_per_epoch: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch}.items():
            if value < 1:
                raise ConfigError(f"data.{name} must be 1 or more, got {value}")
        check_environment(environment)
        self.environment = environment
        self.engine = engine
        self.served_model = served_model
        self.sampling = sampling
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self._collector: Collector | None = None

    @property
    def rows_per_step(self) -> int:
        """Rollouts of one optimizer step, over all ranks."""
        return self.batch_size * self.sampling.group_size

    def setup(self, stage: str) -> None:
        """Starts the engine.

        Raises:
            ConfigError: The step cannot be divided over the trainer's ranks.
            EngineError: The engine did not start.
        """
        trainer = self._trainer
        if self.batch_size % trainer.world_size:
            raise ConfigError(
                f"data.batch_size={self.batch_size} is no multiple of the {trainer.world_size} ranks, which each sample their "
                "share of the items"
            )
        chat = Chat(self.served_model.folder)
        self._collector = Collector(self.engine, self.environment, chat, self.sampling)
        if stage == "fit":
            self._check_training()
        log_file = Path(trainer.default_root_dir) / ENGINE_LOG
        self.engine.start(EngineSpec(self.served_model, self.sampling.max_length, self.seed, log_file))

    def teardown(self, stage: str) -> None:
        """Ends the engine, while the interpreter is still whole."""
        self.engine.close()

    def on_exception(self, exception: BaseException) -> None:
        """Ends the engine of a run that failed: Lightning calls no teardown then."""
        self.engine.close()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a batch's tensors; Lightning's own way into nested data refuses frozen records."""
        return batch.to(device) if isinstance(batch, Batch) else batch

    def train_dataloader(self) -> DataLoader[Any]:
        """One phase per optimizer step, of exactly `accumulate_grad_batches` micro-batches."""
        num_micro_batches = self._trainer.accumulate_grad_batches
        return _loader(PhaseDataset(self._train_step, self.steps_per_epoch, num_micro_batches))

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out split, sampled all at once."""
        return _loader(PhaseDataset(self._evaluate, num_phases=1, batches_per_phase=1))

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None, "Lightning attaches the trainer"
        return self.trainer

    def _check_training(self) -> None:
        """Refuses, before the engine starts, what would fail or silently drop rows later."""
        assert self._collector is not None
        trainer, items = self._trainer, self.environment.train_items()
        item_indices(self.seed, 0, len(items), self.batch_size)
        self._collector.check_prompts(items)
        limit, num_micro_batches = trainer.limit_train_batches, trainer.accumulate_grad_batches
        num_batches = limit if isinstance(limit, int) else int(self.steps_per_epoch * num_micro_batches * limit)
        if num_batches % num_micro_batches:
            raise ConfigError(
                f"trainer.limit_train_batches={limit} would cut an optimizer step: it has {num_micro_batches} micro-batches "
                "(trainer.accumulate_grad_batches); use data.steps_per_epoch or trainer.max_steps"
            )
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError(
                "GradientAccumulationScheduler would cut optimizer steps: set trainer.accumulate_grad_batches"
            )

    def _share(self, indices: list[int]) -> list[int]:
        return indices[self._trainer.global_rank :: self._trainer.world_size]

    def _train_step(self) -> list[Batch]:
        assert self._collector is not None, "setup comes first"
        step = self._trainer.global_step
        items = self.environment.train_items()
        indices = self._share(item_indices(self.seed, step, len(items), self.batch_size))
        draw = Draw(items, indices, self.sampling.group_size, self.sampling.temperature, (self.seed, "train", step))
        start = time.perf_counter()
        groups = make_groups(asyncio.run(self._collector.collect(draw)))
        metrics = self._metrics_over_ranks(step_metrics(groups, self.environment, time.perf_counter() - start))
        samples = make_samples(groups)
        denominators = self._over_ranks(count_denominators(samples, self.sampling.max_completion_tokens))
        version = min(sample.rollout.policy_version for sample in samples)
        return make_batches(samples, self._trainer.accumulate_grad_batches, denominators, version, metrics)

    def _over_ranks(self, local: Denominators) -> Denominators:
        counts = torch.tensor([local.num_tokens, local.num_rows], dtype=torch.int64)
        counts = self._trainer.strategy.reduce(counts.to(self._trainer.strategy.root_device), reduce_op="sum")
        num_tokens, num_rows = counts.tolist()
        return Denominators(num_tokens, num_rows, local.max_completion_tokens)

    def _metrics_over_ranks(self, local: dict[str, float]) -> dict[str, float]:
        """Means over ranks, which all have as many rollouts; counts and rates are added up."""
        strategy, num_ranks = self._trainer.strategy, self._trainer.world_size
        values = torch.tensor(list(local.values()), dtype=torch.float64, device=strategy.root_device)
        means = dict(zip(local, (strategy.reduce(values, reduce_op="sum") / num_ranks).tolist(), strict=True))
        return {name: mean * num_ranks if name in SUMMED_METRICS else mean for name, mean in means.items()}

    def _evaluate(self) -> list[Evaluation]:
        assert self._collector is not None, "setup comes first"
        items = self.environment.validation_items()
        if len(items) < self._trainer.world_size:
            raise ConfigError(
                f"{type(self.environment).__name__}.validation_items has {len(items)} items for {self._trainer.world_size} "
                "rank(s): add some, or set trainer.limit_val_batches to 0"
            )
        indices = self._share(list(range(len(items))))
        draw = Draw(items, indices, 1, self.sampling.validation_temperature, (self.seed, "validation"))
        siblings = asyncio.run(self._collector.collect(draw))
        rollouts = tuple(rollout for group in siblings for rollout in group)
        return [Evaluation(rollouts, reward_metrics(rollouts, self.environment))]


def _loader(dataset: PhaseDataset) -> DataLoader[Any]:
    # A loader draws a seed for its workers whenever it is iterated. From torch's global generator that would make a resumed
    # run, which iterates at another moment, drop out other activations than the run it resumes.
    return DataLoader(dataset, batch_size=None, num_workers=0, generator=torch.Generator())
