"""The DataModule: each optimizer step's items become rollouts, groups, advantages and micro-batches."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fuchsia_pl.engines.base import Engine, EngineSpec
from fuchsia_pl.envs.base import Environment, check_environment, reward_name, weights_at
from fuchsia_pl.objectives.config import Learner
from fuchsia_pl.objectives.presets import GROUP_ADVANTAGES
from fuchsia_pl.rollouts.addressing import item_indices, refill_indices
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.credit import OVERLONG, make_samples, penalise_overlong, scores_by_rollout
from fuchsia_pl.rollouts.dynamic import Sampled, sample_groups
from fuchsia_pl.rollouts.metrics import StepRecord, over_ranks, reward_fractions, step_fractions
from fuchsia_pl.types import Batch, ConfigError, Denominators, Evaluation, RolloutGroup, RolloutScores, Sample

ENGINE_LOG = "engine.log"
CLOSE_TIMEOUT_S = 60.0
T = TypeVar("T")
NO_ROWS = "none of the step's rollouts can be trained on: not scored, masked, or in groups without spread"
NO_ADVANTAGE = "every advantage of the step is 0: the rewards do not differ"


class Scorer(Protocol):
    """What the data module knows of the module: it says of rollouts what only the model can."""

    def score_rollouts(self, batches: list[Batch]) -> list[RolloutScores]:
        """KL and values of the tokens of some micro-batches."""


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
        learner: The model that is sampled from and the objective that is learned; the CLI takes it from the module.
        sampling: How rollouts are sampled.
        batch_size: Items of one phase of rollouts, over all ranks; each becomes `sampling.group_size` rollouts. A phase is
            one optimizer step, or `num_policy_updates` of them.
        steps_per_epoch: Optimizer steps between two validations.
        seed: The run's seed; the CLI takes it from `seed_everything`.

    Raises:
        ConfigError: A size is below 1 or does not fit the objective, or the environment could not be trained on.
    """

    def __init__(
        self,
        environment: Environment,
        engine: Engine,
        learner: Learner,
        sampling: SamplingConfig,
        batch_size: int = 8,
        steps_per_epoch: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch}.items():
            if value < 1:
                raise ConfigError(f"data.{name} must be 1 or more, got {value}")
        loss = learner.loss
        if steps_per_epoch % loss.num_policy_updates:
            raise ConfigError(
                f"data.steps_per_epoch={steps_per_epoch} is no multiple of model.loss.num_policy_updates="
                f"{loss.num_policy_updates}: an epoch would end within a phase"
            )
        if sampling.group_size < 2 and loss.parts.advantage in GROUP_ADVANTAGES:
            raise ConfigError(
                f"data.sampling.group_size must be 2 or more, got {sampling.group_size}: advantage "
                f'"{loss.parts.advantage}" compares siblings of one item'
            )
        check_environment(environment)
        if OVERLONG in [reward_name(function) for function in environment.reward_functions]:
            raise ConfigError(f"{type(environment).__name__} has a reward function {OVERLONG!r}: the name is taken")
        self.environment = environment
        self.engine = engine
        self.served_model = learner.served_model
        self.loss = loss
        self.sampling = sampling
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self._collector: Collector | None = None
        # One event loop for the whole run: connections to tool servers live on it from phase to phase.
        self._runner: asyncio.Runner | None = None
        self._fitting: list[int] = []  # positions of the training items whose prompts are short enough

    @property
    def rows_per_step(self) -> int:
        """Rollouts of one optimizer step, over all ranks."""
        return self.batch_size * self.sampling.group_size

    def setup(self, stage: str) -> None:
        """Starts what the environment needs, checks what will be asked, and starts the engine.

        Raises:
            ConfigError: The step cannot be divided over the trainer's ranks, or the environment does not suit the model.
            ToolServerError: A tool server did not start.
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
        self._run(self._collector.prepare())
        if stage == "fit":
            self._check_training()
        log_file = Path(trainer.default_root_dir) / ENGINE_LOG
        self.engine.start(EngineSpec(self.served_model, self.sampling.max_length, self.seed, log_file))

    def teardown(self, stage: str) -> None:
        """Ends the environment's servers and the engine, while the interpreter is still whole."""
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        """The same for a run that failed: Lightning calls no teardown then."""
        self._close()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a batch's tensors; Lightning's own way into nested data refuses frozen records."""
        return batch.to(device) if isinstance(batch, Batch) else batch

    def train_dataloader(self) -> DataLoader[Any]:
        """Phases of `accumulate_grad_batches` micro-batches for each of their `num_policy_updates` optimizer steps."""
        num_updates = self.loss.num_policy_updates
        batches_per_phase = self._trainer.accumulate_grad_batches * num_updates
        return _loader(PhaseDataset(self._train_phase, self.steps_per_epoch // num_updates, batches_per_phase))

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
        trainer, items, num_updates = self._trainer, self.environment.train_items(), self.loss.num_policy_updates
        item_indices(self.seed, 0, len(items), self.batch_size)
        self._collector.check_template(items[0])
        self._fitting = self._collector.fitting(items)
        item_indices(self.seed, 0, len(self._fitting), self.batch_size)
        limit, num_micro_batches = trainer.limit_train_batches, trainer.accumulate_grad_batches
        batches_per_phase = num_micro_batches * num_updates
        num_batches = limit if isinstance(limit, int) else int(self.steps_per_epoch * num_micro_batches * limit)
        if num_batches % batches_per_phase:
            raise ConfigError(
                f"trainer.limit_train_batches={limit} would cut a phase: it has {batches_per_phase} micro-batches "
                "(trainer.accumulate_grad_batches x model.loss.num_policy_updates); use data.steps_per_epoch or trainer.max_steps"
            )
        if trainer.max_steps > 0 and trainer.max_steps % num_updates:
            raise ConfigError(
                f"trainer.max_steps={trainer.max_steps} is no multiple of model.loss.num_policy_updates={num_updates}: the run "
                "would end within a phase"
            )
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError(
                "GradientAccumulationScheduler would cut optimizer steps: set trainer.accumulate_grad_batches"
            )

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end on the run's event loop."""
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(coroutine)

    def _close(self) -> None:
        try:
            if self._runner is not None:
                self._runner.run(asyncio.wait_for(self.environment.close(), CLOSE_TIMEOUT_S))
        finally:
            if self._runner is not None:
                self._runner.close()
            self._runner = None
            self.engine.close()

    def _share(self, indices: list[int]) -> list[int]:
        return indices[self._trainer.global_rank :: self._trainer.world_size]

    def _train_phase(self) -> list[Batch]:
        assert self._collector is not None, "setup comes first"
        num_updates, num_micro_batches = self.loss.num_policy_updates, self._trainer.accumulate_grad_batches
        start = time.perf_counter()
        sampled = self._sample(phase=self._trainer.global_step // num_updates)
        seconds = time.perf_counter() - start
        rollouts = [rollout for group in [*sampled.kept, *sampled.dropped] for rollout in group.rollouts]
        version = min((r.policy_version for r in rollouts if r.turns), default=self.engine.policy_version)
        penalise_overlong(self.loss, [*sampled.kept, *sampled.dropped], self.sampling.max_completion_tokens)
        scores = self._scores(sampled.kept, version)
        weights = weights_at(self.environment, self._trainer.global_step)
        samples = make_samples(self.loss, sampled.kept, weights, scores, self._add_up)
        kl = [of_rollout.kl for of_rollout in scores.values() if of_rollout.kl is not None]
        kl_total = (float(sum(row.sum() for row in kl)), float(sum(row.numel() for row in kl)))
        record = StepRecord(
            sampled.kept,
            sampled.dropped,
            sampled.num_refills,
            len(samples),
            seconds,
            len(self.environment.train_items()) - len(self._fitting),
            kl_total if self.loss.kl_in_reward else None,
        )
        world_size = self._trainer.world_size
        metrics = over_ranks(step_fractions(record, self.environment, world_size), self._add_up)
        denominators, skip_reason = self._count(samples)
        batches = make_batches(samples, num_micro_batches, denominators, version, metrics)
        trained = {id(sample.rollout) for sample in samples}
        unused = tuple(rollout for rollout in rollouts if id(rollout) not in trained)
        batches[0] = replace(batches[0], unused=unused)
        batches = [replace(batch, skip_reason=skip_reason) for batch in batches]
        return [replace(batch, policy_update=update) for update in range(num_updates) for batch in batches]

    def _sample(self, phase: int) -> Sampled:
        assert self._collector is not None
        places = item_indices(self.seed, phase, len(self._fitting), self.batch_size)
        draw = Draw(
            items=self.environment.train_items(),
            indices=self._share([self._fitting[place] for place in places]),
            siblings=self.sampling.group_size,
            temperature=self.sampling.temperature,
            address=(self.seed, "train", phase),
            step=self._trainer.global_step,
        )
        max_refills = self.loss.parts.max_refills
        others = refill_indices(self.seed, phase, len(self._fitting), set(places)) if max_refills else []
        spare = self._share([self._fitting[place] for place in others])
        return self._run(sample_groups(self._collector, draw, spare, max_refills))

    def _scores(self, groups: Sequence[RolloutGroup], version: int) -> dict[int, RolloutScores]:
        """The trainer's word on the rollouts, where advantages need it."""
        if not self.loss.needs_scores:
            return {}
        samples = [
            Sample(rollout, (0.0,) * rollout.num_sampled_tokens) for group in groups for rollout in group.rollouts
        ]
        device = self._trainer.strategy.root_device
        number = self._trainer.accumulate_grad_batches
        batches = [batch.to(device) for batch in make_batches(samples, number, Denominators(1, 1, 1), version, {})]
        scorer = cast(Scorer, self._trainer.lightning_module)
        return scores_by_rollout(batches, scorer.score_rollouts(batches))

    def _count(self, samples: Sequence[Sample]) -> tuple[Denominators, str | None]:
        """The step's denominators over all ranks, and why there is nothing to learn from it, if so."""
        local = count_denominators(samples, self.sampling.max_completion_tokens)
        num_learnable = sum(any(sample.advantages) or sample.old_values != sample.value_targets for sample in samples)
        counts = torch.tensor([local.num_tokens, local.num_rows, num_learnable], dtype=torch.int64)
        num_tokens, num_rows, num_learnable = self._add_up(counts).tolist()
        reason = NO_ROWS if num_rows == 0 else NO_ADVANTAGE if num_learnable == 0 else None
        return Denominators(num_tokens, num_rows, local.max_completion_tokens), reason

    def _add_up(self, values: Tensor) -> Tensor:
        strategy = self._trainer.strategy  # its reduce works in place on some strategies
        return strategy.reduce(values.clone().to(strategy.root_device), reduce_op="sum").cpu()

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
        siblings = self._run(self._collector.collect(draw))
        rollouts = tuple(rollout for group in siblings for rollout in group)
        fractions = reward_fractions(rollouts, self.environment, self._trainer.world_size)
        return [Evaluation(rollouts, over_ranks(fractions, self._add_up))]


def _loader(dataset: PhaseDataset) -> DataLoader[Any]:
    # A loader draws a seed for its workers whenever it is iterated. From torch's global generator that would make a resumed
    # run, which iterates at another moment, drop out other activations than the run it resumes.
    return DataLoader(dataset, batch_size=None, num_workers=0, generator=torch.Generator())
