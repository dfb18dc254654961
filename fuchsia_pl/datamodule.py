"""The LightningDataModule: samples the rollouts of each phase and passes them to the trainer as micro-batches."""

import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from fuchsia_pl.batch import Batch
from fuchsia_pl.engines.base import Engine
from fuchsia_pl.engines.vllm_teacher import TeacherServer
from fuchsia_pl.envs.base import Environment, check_environment, check_rewards
from fuchsia_pl.envs.bounded import call_apart
from fuchsia_pl.evaluation.measures import Occasion, measure
from fuchsia_pl.evaluation.shared_items import checked_shared_items
from fuchsia_pl.loop import LoopThread
from fuchsia_pl.objectives.config import Learner
from fuchsia_pl.progress import progress
from fuchsia_pl.rollouts import budget, preparation
from fuchsia_pl.rollouts.ahead import PhasesAhead
from fuchsia_pl.rollouts.calls import end_rollouts
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.choice import Chooser, PhaseSizes
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.config import SamplingConfig, check_sizes
from fuchsia_pl.rollouts.dynamic import Sampled, sample_groups
from fuchsia_pl.rollouts.flags import Limits, check_settings, count_micro_batches, return_limits, take_limits
from fuchsia_pl.rollouts.levels import check_repeats, chooser_for
from fuchsia_pl.rollouts.part_collector import check_parts, collector_for, mean_group_size
from fuchsia_pl.rollouts.phases import PhaseDataset, check_phases, num_phases, phase_loader
from fuchsia_pl.rollouts.ranks import Ranks, ranks_of
from fuchsia_pl.rollouts.restarts import sampled_by
from fuchsia_pl.rollouts.run_checks import SignalSource, check_run_setup, engine_spec
from fuchsia_pl.rollouts.teacher import TeacherConfig
from fuchsia_pl.rollouts.teacher_setup import check_teacher, ready_teacher
from fuchsia_pl.rollouts.training_phase import Forward, TrainingPhase
from fuchsia_pl.samples import Evaluation
from fuchsia_pl.stopping import stopping

CLOSE_TIMEOUT_S = 60.0
logger = logging.getLogger(__name__)
T = TypeVar("T")


class RolloutDataModule(LightningDataModule):
    """Samples rollouts for training and for validation.

    Args:
        environment: Items, conversations and rewards.
        engine: Engine that generates completions.
        learner: Model and objective; the CLI takes them from the module.
        sampling: Settings of sampling.
        batch_size: Items of one phase of rollouts, over all ranks; each becomes `sampling.group_size` rollouts. A phase is
            one optimizer step, or `mini_batches` x `num_policy_updates` of them.
        steps_per_epoch: Optimizer steps between two validations.
        seed: The run's seed; the CLI takes it from `seed_everything`.
        teacher: A model that scores what the policy has sampled; its logprobs become advantages.

    Raises:
        ConfigError: A size is below 1 or does not fit the objective, or the environment cannot be used for training.
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
        teacher: TeacherConfig | None = None,
    ) -> None:
        super().__init__()
        check_sizes(learner.loss, sampling, batch_size, steps_per_epoch)
        check_environment(environment)
        preparation.check_reward_names(environment)
        check_parts(environment, learner.loss, sampling)
        self.environment = environment
        self.engine = engine
        self.served_model = learner.served_model
        self.loss = learner.loss
        self.sampling = sampling
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.teacher = teacher
        self._started_at = datetime.now()  # the date that a chat template writes
        self._stage = ""
        self._collector: Collector | None = None
        self._held_out_collector: Collector | None = None
        self._loop: LoopThread | None = None
        self._phases: PhasesAhead[Sampled] | None = None
        self._chooser: Chooser | None = None  # of the training items whose prompts are short enough
        self._num_too_long = 0  # training items whose prompts are not
        self._held_out: list[int] = []  # positions of the held-out items whose prompts are short enough
        self._shared: frozenset[int] | None = None  # those with the prompt of a training item, None if not known
        self._longest_row: budget.LongestRow | None = None
        self._planned = 1  # number of micro-batches that the budget requires
        self._limits: Limits | None = None
        self._teacher_server: TeacherServer | None = None

    @property
    def rows_per_phase(self) -> int:
        """Rollouts of one phase, over all ranks, without those of replaced groups; the mean over phases for a mixture."""
        return round(self.batch_size * mean_group_size(self.environment, self.sampling.group_size))

    @property
    def rows_per_step(self) -> int:
        """Rollouts of one optimizer step, over all ranks."""
        return self.rows_per_phase // self.loss.mini_batches

    def setup(self, stage: str) -> None:
        """Prepares the environment, checks the prompts, and starts the engine.

        Raises:
            ConfigError: The step cannot be divided over the trainer's ranks, or the environment does not suit the model, or has
                no rewards and the stage is not "predict".
            ToolServerError: A tool server did not start.
            EngineError: The engine did not start.
        """
        trainer, self._stage = self._trainer, stage
        if stage != "predict":
            check_rewards(self.environment)
        mini_batches = self.loss.mini_batches if stage == "fit" else 1
        preparation.check_shares(self.batch_size, trainer.world_size, mini_batches)
        sleeps = check_run_setup(trainer)
        steps_per_phase = self.loss.steps_per_phase
        self._limits = take_limits(trainer, stage, self.steps_per_epoch, steps_per_phase, self.batch_size)
        self._started_at = trainer.strategy.broadcast(self._started_at)
        self._collector = collector_for(self.engine, self.environment, self.make_chat(), self.sampling)
        self._held_out_collector = collector_for(
            self.engine, self.environment, self._collector.chat, self.sampling.held_out
        )
        with preparation.as_config_error(f"{type(self.environment).__name__}.prepare"):
            self._run(self._collector.prepare())
        call_apart(self._check_prompts)
        if stage == "fit":
            self._prepare_teacher()
        with progress.activity(f"starting {self.engine.name}"):
            rewards_gb = self.environment.rewards_gb(trainer.strategy.root_device.index)
            self.engine.start(engine_spec(trainer, self.served_model, self.sampling, self.seed, sleeps, rewards_gb))

    def make_chat(self) -> Chat:
        """Tokenizer and chat template of the model."""
        model = self.served_model
        return Chat(model.folder, model.chat_template, self._started_at, self.sampling.special_tokens_in_text)

    @property
    def chat(self) -> Chat:
        """Tokenizer and chat template of the run, from `setup` on."""
        assert self._collector is not None, "setup is called first"
        return self._collector.chat

    def state_dict(self) -> dict[str, Any]:
        """Content of a checkpoint: the start time of the run, and the state of a curriculum."""
        chosen = self._chooser.state_dict() if self._chooser is not None else {}
        return {"started_at": self._started_at.isoformat(), **({"chooser": chosen} if chosen else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the start time of the resumed run, so that dated prompts are the same. Lightning calls this after `setup`."""
        self._started_at = datetime.fromisoformat(state_dict["started_at"])
        if self._collector is not None and self._held_out_collector is not None:
            was_read = self._collector.chat.template.has_read_date
            self._collector.chat = self._held_out_collector.chat = self.make_chat()
            if was_read:
                call_apart(self._check_prompts)  # makes a new chooser
        if self._chooser is not None:
            self._chooser.load_state_dict(state_dict.get("chooser", {}))

    def teardown(self, stage: str) -> None:
        """Closes the environment and the engine before the interpreter shuts down."""
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        """Closes them after a failure, for which Lightning calls no teardown."""
        try:
            self._close()
        except Exception:  # it must not replace the error that ended the run
            logger.exception("the environment or the engine could not be closed")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a batch's tensors; Lightning's own function does not accept frozen dataclasses."""
        return batch.to(device) if isinstance(batch, Batch) else batch

    def train_dataloader(self) -> DataLoader[Any]:
        """Phases of `accumulate_grad_batches` micro-batches for each of their optimizer steps."""
        steps_per_phase, steps_per_epoch = self.loss.steps_per_phase, self._taken.steps_per_epoch
        max_tokens = self._signal_source.max_tokens_per_micro_batch
        if max_tokens is not None:
            self._plan_micro_batches(max_tokens)
        count_micro_batches(self._trainer, self._taken)
        batches_per_phase = self._trainer.accumulate_grad_batches * steps_per_phase
        if self._phases is None:
            num_ahead = self._phase_sizes.num_ahead
            last = num_phases(self._trainer, steps_per_epoch, steps_per_phase)
            self._phases = PhasesAhead(self._loop_thread, self._sample, num_ahead, last)
        return phase_loader(PhaseDataset(self._train_phase, steps_per_epoch // steps_per_phase, batches_per_phase))

    def val_dataloader(self) -> DataLoader[Any]:
        """All rollouts of the held-out split, as one batch."""
        return phase_loader(PhaseDataset(self._evaluate, num_phases=1, batches_per_phase=1))

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def paused(self) -> AbstractContextManager[None]:
        """Keeps requests out of the engine inside the `with` block, unless rollouts continue with new weights."""
        if self._phases is None or self.sampling.in_flight == "continue":
            return nullcontext()
        return self._phases.paused(self._waited)

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None, "Lightning attaches the trainer"
        return self.trainer

    @property
    def _taken(self) -> Limits:
        assert self._limits is not None, "setup is called first"
        return self._limits

    @property
    def _signal_source(self) -> SignalSource:
        return cast(SignalSource, self._trainer.lightning_module)

    def _check_prompts(self) -> None:
        """Renders all prompts of the stage and raises an error for those that cannot be used."""
        assert self._collector is not None
        assert self._held_out_collector is not None
        if self._stage == "fit":
            self._check_training(self._collector)
        if self._taken.held_out:
            num_ranks = self._trainer.world_size
            positions = preparation.held_out_prompts(self._held_out_collector, num_ranks)
            self._held_out = self._taken.first_held_out(positions, num_ranks)
            warns, is_fit = self._trainer.is_global_zero, self._stage == "fit"
            if self._stage != "predict":
                self._shared = checked_shared_items(self.environment, self._held_out, is_fit, warns)

    def _prepare_teacher(self) -> None:
        """Loads the adapter of a teacher, or checks its server."""
        config = self.teacher
        self._signal_source.use_teacher(None if config is None else config.adapter)
        if config is not None and config.name and config.url:
            self._teacher_server = TeacherServer(config.url, config.name)
            self._run(self._teacher_server.check(self.chat.tokenizer, self.sampling.max_length))

    def _check_training(self, collector: Collector) -> None:
        """Checks, before the engine starts, settings and prompts that would fail or drop rows later."""
        trainer, has_turns = self._trainer, self.environment.max_steps > 1
        check_settings(trainer)
        prompts = preparation.training_prompts(collector, self.seed, self.batch_size)
        items = preparation.training_items(self.environment)
        self._num_too_long = len(items) - len(prompts)
        check_repeats(self.sampling.curriculum, self._taken.num_repeated_phases)
        self._chooser = chooser_for(self.environment, items, list(prompts), self.sampling, self._phase_sizes)
        self._longest_row = budget.longest_row(prompts.values(), self.sampling, has_turns)
        check_teacher(self.teacher, self.loss, self.served_model, collector, prompts)
        max_tokens = self._signal_source.max_tokens_per_micro_batch
        if max_tokens is None:
            check_phases(trainer, self._taken.steps_per_epoch, self.loss.steps_per_phase)
        else:
            budget.check_no_number(trainer.accumulate_grad_batches, self._planned, max_tokens)
            budget.check_budget(self._longest_row, max_tokens)

    def _plan_micro_batches(self, max_tokens: int) -> None:
        """Sets the trainer's number of micro-batches. It depends on the loaded model, which may share prefixes."""
        assert self._longest_row is not None, "setup is called first"
        groups, group_size, shares = self._groups_per_step, self.sampling.group_size, self._always_shares_prefix
        self._planned = budget.plan_micro_batches(self._longest_row, groups, group_size, shares, max_tokens)
        self._trainer.accumulate_grad_batches = self._planned
        check_phases(self._trainer, self._taken.steps_per_epoch, self.loss.steps_per_phase)

    @property
    def longest_row(self) -> budget.LongestRow | None:
        """The longest row that training can sample; None in other stages, and before `setup` has rendered the prompts."""
        return self._longest_row

    def longest_batch(self) -> Batch:
        """The largest micro-batch of the run, filled with arbitrary ids."""
        assert self._longest_row is not None, "setup is called first"
        step, forward = self._trainer.global_step, replace(self._forward, shares_prefix=self._always_shares_prefix)
        return budget.longest_batch(self._longest_row, self._groups_per_step, self.sampling, forward, step)

    @property
    def _groups_per_step(self) -> int:
        """Groups of rows of one optimizer step on this rank, at most: siblings' first rows, their second ones, and so on."""
        return self.environment.max_rows * self.batch_size // (self._trainer.world_size * self.loss.mini_batches)

    @property
    def _always_shares_prefix(self) -> bool:
        """Whether the prompt of each group of rows is computed once. Rewritten histories need not have a common beginning."""
        return self._signal_source.shares_prefix and self.environment.max_rows == 1

    @property
    def _ranks(self) -> Ranks:
        return ranks_of(self._trainer)

    @property
    def _forward(self) -> Forward:
        source, trainer = self._signal_source, self._trainer
        return Forward(
            trainer.accumulate_grad_batches,
            source.shares_prefix,
            source.trainer_signals,
            trainer.strategy.root_device,
            source.max_tokens_per_micro_batch,
            self._ranks.highest,
            source.teacher_logprobs,
        )

    @property
    def _training_phase(self) -> TrainingPhase:
        environment, loss, sampling = self.environment, self.loss, self.sampling
        server, teacher = self._teacher_server, None
        if self.teacher is not None and self._collector is not None:
            score = None if server is None else lambda rows: self._waited(lambda: self._run(server.score(rows)))
            teacher = ready_teacher(self.teacher, self._collector, score)
        return TrainingPhase(environment, loss, sampling, self.seed, self._num_too_long, self._ranks, teacher)

    @property
    def _phase_sizes(self) -> PhaseSizes:
        num_ahead = self.sampling.max_staleness // self.loss.steps_per_phase
        return PhaseSizes(self.seed, self.batch_size, self.loss.parts.max_refills > 0, num_ahead)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end on the run's event loop."""
        return self._loop_thread.run(coroutine, None)  # without a time limit: environments and engines have their own

    @property
    def _loop_thread(self) -> LoopThread:
        if self._loop is None:
            self._loop = LoopThread("rollouts")
        return self._loop

    def _close(self) -> None:
        loop, phases, self._loop, self._phases = self._loop, self._phases, None, None
        server, self._teacher_server = self._teacher_server, None
        if self._limits is not None and self.trainer is not None:
            return_limits(self.trainer, self._limits)
            self._limits = None
        try:
            if loop is not None and server is not None:
                loop.run(server.close(), CLOSE_TIMEOUT_S)
            if loop is not None:
                loop.run(end_rollouts(self.environment, phases, CLOSE_TIMEOUT_S), 3 * CLOSE_TIMEOUT_S)
        finally:
            if loop is not None:
                loop.stop(CLOSE_TIMEOUT_S)
            self.engine.close()

    def _train_phase(self) -> list[Batch]:
        assert self._phases is not None, "train_dataloader is called first"
        assert self._chooser is not None, "setup is called first"
        step = self._trainer.global_step
        phase = step // self.loss.steps_per_phase
        self._chooser.plan(phase)
        sampled = self._waited(partial(self._phases.take, phase))
        self._chooser.observe(phase, sampled.groups, self._ranks)
        return self._training_phase.batches(sampled, step, self.engine.policy_version, self._forward)

    async def _sample(self, phase: int) -> Sampled:
        assert self._collector is not None, "setup is called first"
        assert self._chooser is not None, "setup is called first"
        start = time.perf_counter()
        choice = self._chooser.choice(self._taken.drawn_phase(phase))
        draw, spare = self._training_phase.draw(phase, choice)
        settings = self.loss.parts.max_refills, self.loss.compares_turns
        sampled = await sampled_by(self.engine, partial(sample_groups, self._collector, draw, spare, *settings))
        return replace(sampled, seconds=time.perf_counter() - start, choice_metrics=choice.metrics)

    def _waited(self, wait: Callable[[], T]) -> T:
        """Returns the result of `wait` on all ranks, or raises on all ranks if one received a signal to stop."""
        return stopping.on_all_ranks(wait, lambda n: int(self._ranks.highest(torch.tensor(float(n)))))

    def _evaluate(self) -> list[Evaluation]:
        collector, trainer, held_out = self._held_out_collector, self._trainer, self._held_out
        assert collector is not None, "setup is called first"
        if trainer.sanity_checking and trainer.num_sanity_val_steps < len(held_out):
            held_out = held_out[: max(int(trainer.num_sanity_val_steps), trainer.world_size)]
        items = call_apart(preparation.held_out_items, self.environment)
        indices, sampling = self._ranks.share(held_out), self.sampling
        address = (self.seed, "validation")
        draw = Draw(items, indices, sampling.validation_samples, sampling.validation_temperature, address)
        groups = self._waited(lambda: self._run(sampled_by(self.engine, partial(collector.collect, draw))))
        if trainer.predicting:
            return [Evaluation(tuple(rollout for group in groups for rollout in group), {})]
        split = "test" if trainer.testing else "validation"
        is_whole = len(held_out) == len(self._held_out)
        occasion = Occasion(self.engine.policy_version, split, self._shared, is_whole)
        return [measure(groups, self.environment, occasion, self._ranks, trainer.strategy.root_device)]
