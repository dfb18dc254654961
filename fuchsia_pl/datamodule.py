"""The DataModule: each optimizer step's items become rollouts, groups, advantages and micro-batches."""

import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from fuchsia_pl.batch import Batch, Denominators, TrainerSignals
from fuchsia_pl.engines.base import Engine, EngineSpec, engine_log
from fuchsia_pl.envs.base import Environment, check_environment, reward_name, weights_at
from fuchsia_pl.envs.bounded import call_apart
from fuchsia_pl.loop import LoopThread, cancel_others
from fuchsia_pl.objectives.config import Learner
from fuchsia_pl.rollouts import credit, preparation
from fuchsia_pl.rollouts.addressing import derived_seed, item_indices, refill_indices
from fuchsia_pl.rollouts.ahead import PhasesAhead
from fuchsia_pl.rollouts.batcher import Unit, count_denominators, count_over_ranks, make_batches, split_balanced
from fuchsia_pl.rollouts.budget import LongestRow, check_budget, longest_row, longest_samples, plan_micro_batches
from fuchsia_pl.rollouts.calls import close
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.config import SamplingConfig, check_sizes
from fuchsia_pl.rollouts.dynamic import Sampled, sample_groups
from fuchsia_pl.rollouts.flags import Limits, check_settings, return_limits, take_limits
from fuchsia_pl.rollouts.metrics import StepRecord, over_ranks, reward_fractions, step_fractions
from fuchsia_pl.rollouts.phases import PhaseDataset, check_phases, num_phases, phase_loader
from fuchsia_pl.rollouts.restarts import sampled_by
from fuchsia_pl.rollouts.run_checks import SignalSource, check_run_setup
from fuchsia_pl.rollouts.staleness import drop_stale, oldest_version
from fuchsia_pl.stopping import stopping
from fuchsia_pl.types import ConfigError, Evaluation, RolloutGroup, Sample

CLOSE_TIMEOUT_S = 60.0
logger = logging.getLogger(__name__)
T = TypeVar("T")


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
        loss = learner.loss
        check_sizes(loss, sampling, batch_size, steps_per_epoch)
        check_environment(environment)
        if credit.OVERLONG in [reward_name(function) for function in environment.reward_functions]:
            raise ConfigError(
                f"{type(environment).__name__} has a reward function {credit.OVERLONG!r}: the name is taken"
            )
        self.environment = environment
        self.engine = engine
        self.served_model = learner.served_model
        self.loss = loss
        self.sampling = sampling
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self._started_at = datetime.now()  # of the run: what a chat template that writes the date takes for the present
        self._stage = ""
        self._collector: Collector | None = None
        self._loop: LoopThread | None = None
        self._phases: PhasesAhead[tuple[Sampled, float]] | None = None
        self._fitting: list[int] = []  # positions of the training items whose prompts are short enough
        self._held_out: list[int] = []  # likewise, of the held-out items
        self._longest_row: LongestRow | None = None
        self._planned = 1  # micro-batches, as the budget decided
        self._limits: Limits | None = None

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
        trainer, self._stage = self._trainer, stage
        preparation.check_shares(self.batch_size, trainer.world_size)
        sleeps = check_run_setup(trainer)
        num_updates = self.loss.num_policy_updates
        self._limits = take_limits(trainer, stage, self.steps_per_epoch, num_updates, self.batch_size)
        self._started_at = trainer.strategy.broadcast(self._started_at)
        self._collector = Collector(self.engine, self.environment, self.make_chat(), self.sampling)
        with preparation.told_as_config_error(f"{type(self.environment).__name__}.prepare"):
            self._run(self._collector.prepare())
        call_apart(self._check_prompts)
        self.engine.start(
            EngineSpec(
                self.served_model,
                self.sampling.max_length,
                self.seed,
                Path(trainer.default_root_dir) / engine_log(trainer.global_rank),
                trainer.world_size,
                trainer.global_rank,
                trainer.local_rank,
                trainer.num_devices,
                trainer.strategy.root_device.index,
                loads_in_flight=self.sampling.in_flight == "continue",
                sleeps=sleeps,
                max_restarts=self.sampling.engine_restarts,
            )
        )

    def make_chat(self) -> Chat:
        """The model's chat, as the config has it."""
        model = self.served_model
        return Chat(model.folder, model.chat_template, self._started_at, self.sampling.special_tokens_in_text)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: when the run was started."""
        return {"started_at": self._started_at.isoformat()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the start of the run that is resumed, so that its prompts are the same. Lightning calls this after `setup`."""
        self._started_at = datetime.fromisoformat(state_dict["started_at"])
        if self._collector is None:
            return
        was_read = self._collector.chat.template.has_read_date
        self._collector.chat = self.make_chat()
        if was_read:
            call_apart(self._check_prompts)

    def teardown(self, stage: str) -> None:
        """Ends the environment's servers and the engine, while the interpreter is still whole."""
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        """The same for a run that failed: Lightning calls no teardown then."""
        try:
            self._close()
        except Exception:  # closing must not hide what ended the run
            logger.exception("the environment and the engine were not closed in order")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a batch's tensors; Lightning's own way into nested data refuses frozen records."""
        return batch.to(device) if isinstance(batch, Batch) else batch

    def train_dataloader(self) -> DataLoader[Any]:
        """Phases of `accumulate_grad_batches` micro-batches for each of their `num_policy_updates` optimizer steps."""
        num_updates, steps_per_epoch = self.loss.num_policy_updates, self._taken.steps_per_epoch
        budget = self._signal_source.max_tokens_per_micro_batch
        if budget is not None:
            self._plan_micro_batches(budget)
        batches_per_phase = self._trainer.accumulate_grad_batches * num_updates
        if self._phases is None:
            num_ahead = self.sampling.max_staleness // num_updates
            last = num_phases(self._trainer, steps_per_epoch, num_updates)
            self._phases = PhasesAhead(self._loop_thread, self._sample, num_ahead, last)
        return phase_loader(PhaseDataset(self._train_phase, steps_per_epoch // num_updates, batches_per_phase))

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out split, sampled all at once."""
        return phase_loader(PhaseDataset(self._evaluate, num_phases=1, batches_per_phase=1))

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def paused(self) -> AbstractContextManager[None]:
        """No request is in flight inside the `with` block, unless rollouts go on with new weights."""
        if self._phases is None or self.sampling.in_flight == "continue":
            return nullcontext()
        return self._phases.paused(self._waited)

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None, "Lightning attaches the trainer"
        return self.trainer

    @property
    def _taken(self) -> Limits:
        assert self._limits is not None, "setup comes first"
        return self._limits

    @property
    def _signal_source(self) -> SignalSource:
        return cast(SignalSource, self._trainer.lightning_module)

    def _check_prompts(self) -> None:
        """Renders all prompts that the stage will need."""
        if self._stage == "fit":
            self._check_training()
        if self._taken.held_out:
            self._check_held_out()

    def _check_training(self) -> None:
        """Refuses, before the engine starts, what would fail or silently drop rows later."""
        assert self._collector is not None
        check_settings(self._trainer)
        trainer, prompts = self._trainer, preparation.training_prompts(self._collector, self.seed, self.batch_size)
        self._fitting = list(prompts)
        self._longest_row = longest_row(prompts.values(), self.sampling, has_turns=self.environment.max_steps > 1)
        budget = self._signal_source.max_tokens_per_micro_batch
        if budget is None:
            check_phases(trainer, self._taken.steps_per_epoch, self.loss.num_policy_updates)
        elif trainer.accumulate_grad_batches not in (1, self._planned):
            raise ConfigError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} and model.policy.max_tokens_per_micro_batch="
                f"{budget} say the same thing twice: leave the budget out, or set --trainer.accumulate_grad_batches 1"
            )
        else:
            check_budget(self._longest_row, budget)

    def _check_held_out(self) -> None:
        """Refuses, before anything is trained, a held-out split that could not be asked."""
        assert self._collector is not None
        num_ranks = self._trainer.world_size
        self._held_out = self._taken.first_held_out(preparation.held_out_prompts(self._collector, num_ranks), num_ranks)

    def _plan_micro_batches(self, max_tokens: int) -> None:
        """Sets the trainer's number of micro-batches; only now does the model say whether it shares prefixes."""
        assert self._longest_row is not None, "setup comes first"
        groups, shares_prefix = self.batch_size // self._trainer.world_size, self._signal_source.shares_prefix
        arguments = self._longest_row, groups, self.sampling.group_size, shares_prefix, max_tokens
        self._planned = plan_micro_batches(*arguments)
        self._trainer.accumulate_grad_batches = self._planned
        check_phases(self._trainer, self._taken.steps_per_epoch, self.loss.num_policy_updates)

    def longest_batch(self) -> Batch:
        """The largest micro-batch that can come, made of filler."""
        assert self._longest_row is not None, "setup comes first"
        groups, trainer = self.batch_size // self._trainer.world_size, self._trainer
        samples = longest_samples(self._longest_row, groups, self.sampling.group_size, self.sampling.temperature)
        denominators = count_denominators(samples, self.sampling.max_completion_tokens)
        largest = max(self._split(samples), key=lambda units: sum(len(unit) for unit in units))
        return make_batches([largest], denominators, trainer.global_step, {})[0]

    def _split(self, samples: Sequence[Sample]) -> list[list[Unit]]:
        return split_balanced(samples, self._trainer.accumulate_grad_batches, self._signal_source.shares_prefix)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end on the run's event loop."""
        return self._loop_thread.run(coroutine, None)  # environments and engines bound whatever they wait for

    @property
    def _loop_thread(self) -> LoopThread:
        if self._loop is None:
            self._loop = LoopThread("rollouts")
        return self._loop

    def _close(self) -> None:
        loop, phases, self._loop, self._phases = self._loop, self._phases, None, None
        if self._limits is not None and self.trainer is not None:
            return_limits(self.trainer, self._limits)
            self._limits = None
        try:
            if loop is not None:
                loop.run(self._end_environment(phases), 3 * CLOSE_TIMEOUT_S)
        finally:
            if loop is not None:
                loop.stop(CLOSE_TIMEOUT_S)
            self.engine.close()

    async def _end_environment(self, phases: PhasesAhead[tuple[Sampled, float]] | None) -> None:
        """Ends rollouts first and connections to tool servers last: those are held by tasks of their own."""
        try:
            if phases is not None:
                await phases.cancel()
        finally:
            try:
                await close(self.environment, CLOSE_TIMEOUT_S)
            finally:
                await cancel_others(CLOSE_TIMEOUT_S)

    def _share(self, indices: list[int]) -> list[int]:
        return indices[self._trainer.global_rank :: self._trainer.world_size]

    def _train_phase(self) -> list[Batch]:
        assert self._phases is not None, "train_dataloader comes first"
        num_updates, step = self.loss.num_policy_updates, self._trainer.global_step
        sampled, seconds = self._waited(partial(self._phases.take, step // num_updates))
        rollouts = [rollout for group in [*sampled.kept, *sampled.dropped] for rollout in group.rollouts]
        version = min((r.policy_version for r in rollouts if r.turns), default=self.engine.policy_version)
        credit.penalise_overlong(self.loss, [*sampled.kept, *sampled.dropped], self.sampling.max_completion_tokens)
        signals = self._signals(sampled.kept, version)
        weights = call_apart(weights_at, self.environment, step)
        made = credit.make_samples(self.loss, sampled.kept, weights, signals, self._add_up)
        samples = drop_stale(made, step, self.sampling.max_staleness)
        version = oldest_version(samples, version, partial(self._over_ranks, "min"))
        effective = [sample for sample in samples if not credit.changes_nothing(self.loss, sample)]
        record = StepRecord(
            sampled.kept,
            sampled.dropped,
            sampled.num_refills,
            len(samples),
            len(samples) - len(effective),
            seconds,
            len(call_apart(preparation.training_items, self.environment)) - len(self._fitting),
            credit.kl_fraction(sampled.kept, signals),
            len(made) - len(samples),
        )
        longest, world_size = self.sampling.max_completion_tokens, self._trainer.world_size
        metrics = over_ranks(call_apart(step_fractions, record, self.environment, world_size), self._add_up)
        denominators, skip_reason = count_over_ranks(samples, effective, longest, self._add_up)
        batches = make_batches(self._split(effective), denominators, version, metrics)
        trained, kept = {id(sample.rollout) for sample in samples}, {id(sample) for sample in effective}
        unused = tuple(rollout for rollout in rollouts if id(rollout) not in trained)
        zero_advantage = tuple(sample for sample in samples if id(sample) not in kept)
        batches[0] = replace(batches[0], unused=unused, zero_advantage=zero_advantage)
        staleness = self.sampling.max_staleness
        batches = [replace(batch, skip_reason=skip_reason, max_staleness=staleness) for batch in batches]
        address = (self.seed, "dropout", self._trainer.global_rank)
        return [
            replace(batch, policy_update=update, dropout_seed=derived_seed(*address, step + update, number))
            for update in range(num_updates)
            for number, batch in enumerate(batches)
        ]

    async def _sample(self, phase: int) -> tuple[Sampled, float]:
        """The groups of a phase and the seconds they took."""
        assert self._collector is not None, "setup comes first"
        start = time.perf_counter()
        drawn = self._taken.drawn_phase(phase)
        places = item_indices(self.seed, drawn, len(self._fitting), self.batch_size)
        draw = Draw(
            items=preparation.training_items(self.environment),
            indices=self._share([self._fitting[place] for place in places]),
            siblings=self.sampling.group_size,
            temperature=self.sampling.temperature,
            address=(self.seed, "train", phase),
            step=phase * self.loss.num_policy_updates,
        )
        max_refills = self.loss.parts.max_refills
        others = refill_indices(self.seed, drawn, len(self._fitting), set(places)) if max_refills else []
        spare = self._share([self._fitting[place] for place in others])
        sampled = await sampled_by(self.engine, partial(sample_groups, self._collector, draw, spare, max_refills))
        return sampled, time.perf_counter() - start

    def _signals(self, groups: Sequence[RolloutGroup], version: int) -> TrainerSignals:
        """KL and critic values computed by the trainer, where advantages need them."""
        if not self.loss.needs_signals:
            return TrainerSignals(None, None)
        samples = [
            Sample(rollout, (0.0,) * rollout.num_sampled_tokens) for group in groups for rollout in group.rollouts
        ]
        device = self._trainer.strategy.root_device
        batches = make_batches(self._split(samples), Denominators(1, 1, 1, 1), version, {})
        batches = [batch.to(device) for batch in batches]
        return credit.signals_of(groups, batches, self._signal_source.trainer_signals(batches))

    def _add_up(self, values: Tensor) -> Tensor:
        return self._over_ranks("sum", values)

    def _waited(self, wait: Callable[[], T]) -> T:
        """What sampling gives, unless some rank was told to end."""
        return stopping.on_all_ranks(wait, lambda n: int(self._over_ranks("max", torch.tensor(float(n)))))

    def _over_ranks(self, how: Literal["sum", "min", "max"], values: Tensor) -> Tensor:
        strategy = self._trainer.strategy  # its reduce works in place on some strategies
        return strategy.reduce(values.clone().to(strategy.root_device), reduce_op=how).cpu()

    def _evaluate(self) -> list[Evaluation]:
        collector, trainer, held_out = self._collector, self._trainer, self._held_out
        assert collector is not None, "setup comes first"
        if trainer.sanity_checking and trainer.num_sanity_val_steps < len(held_out):
            held_out = held_out[: max(int(trainer.num_sanity_val_steps), trainer.world_size)]
        items = call_apart(preparation.held_out_items, self.environment)
        draw = Draw(items, self._share(held_out), 1, self.sampling.validation_temperature, (self.seed, "validation"))
        siblings = self._waited(lambda: self._run(sampled_by(self.engine, partial(collector.collect, draw))))
        rollouts = tuple(rollout for group in siblings for rollout in group)
        fractions = call_apart(reward_fractions, rollouts, self.environment, trainer.world_size)
        return [Evaluation(rollouts, over_ranks(fractions, self._add_up))]
