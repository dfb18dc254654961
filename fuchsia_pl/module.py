"""The LightningModule: computes log-probabilities, the loss of a micro-batch and the metrics of an optimizer step."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fuchsia_pl.batch import Batch, StepInfo, TrainerSignals
from fuchsia_pl.objectives.config import Learner, LossConfig
from fuchsia_pl.objectives.loss import logprob_gap, policy_loss
from fuchsia_pl.policy.checkpoint_files import (
    MICRO_BATCHES_KEY,
    OPTIMIZATION_KEY,
    OPTIMIZER_SHAPES_KEY,
    OWN_KEYS,
    SETTINGS_KEY,
    SHAPES_KEY,
    begin_next_epoch,
    check_between_phases,
    check_contents,
    check_trained,
    optimizer_shapes,
    parsed_settings,
    read_checkpoint,
)
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.contents import AVERAGED_WEIGHTS
from fuchsia_pl.policy.cpu import warn_of_slow_bfloat16
from fuchsia_pl.policy.optimization import Recipe, ResumeChoice, Resumed, resumed
from fuchsia_pl.policy.policy import Policy, own_randomness
from fuchsia_pl.policy.schedules import check_optimization, lightning_config
from fuchsia_pl.policy.sharding import built_on_all_ranks, check_sharded, mesh_of_all_ranks, total_norm
from fuchsia_pl.policy.signals import trainer_signals
from fuchsia_pl.policy.sources import read_template, resolve_model
from fuchsia_pl.policy.teacher_adapter import TeacherAdapter
from fuchsia_pl.samples import Evaluation
from fuchsia_pl.types import ConfigError, ServedModel

logger = logging.getLogger(__name__)


class GRPOModule(LightningModule):
    """Trains a policy on batches of rollouts, by GRPO or a related algorithm.

    Lightning runs the optimization: gradient clipping, accumulation and precision are settings of the trainer, with
    their usual meaning.

    Args:
        policy: The model that is trained.
        loss: The objective.
        optimizer: Constructs the optimizer from the trained weights.
        lr_scheduler: Constructs the schedule from the optimizer. It is stepped once per optimizer step, or once per
            validation if it monitors a held-out metric. None keeps the learning rate constant.

    """

    def __init__(
        self,
        policy: PolicyConfig,
        loss: LossConfig,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.policy_config = policy
        self.loss_config = loss
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        lora_rank = policy.lora.r if policy.lora.enabled else 0
        template = read_template(policy.chat_template)
        self.learner = Learner(ServedModel(policy.name, policy.dtype, lora_rank, resolve_model, template), loss)
        self.policy: Policy | None = None
        self.teacher: TeacherAdapter | None = None
        self.step_metrics: dict[str, Tensor] = {}
        self.rollout_metrics: Mapping[str, float] = {}
        self.loaded_step = 0
        self.loaded_micro_batches: int | None = None
        self.resume_choice = ResumeChoice()
        self.resumed: Resumed | None = None
        self.skip_reason: str | None = None
        # Trainer logprobs before the first update of the phase: of each micro-batch of this step, and of each of the phase's
        # mini-batches; reference logprobs of the newest micro-batch.
        self.trainer_logprobs: list[Tensor] = []
        self.phase_logprobs: list[list[Tensor]] = []
        self.ref_logprobs: Tensor | None = None
        # A checkpoint contains the trained weights and never the base weights.
        self.strict_loading = False

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that every run needs and the trainer does not have."""
        from fuchsia_pl.callbacks.defaults import missing_callbacks  # callbacks import this file

        return missing_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Loads the model once per process. If weights are sharded, the first rank loads it and the others receive their shards.

        Raises:
            ConfigError: The config does not suit the model, or the strategy does not average gradients over all ranks.
        """
        if self.device_mesh is None:
            self.policy = self.policy or self._build_policy()
            return
        if self.policy is not None and self.policy.is_sharded:
            return
        mesh = mesh_of_all_ranks(self.device_mesh, self.trainer.world_size)
        is_empty = not self.trainer.is_global_zero
        self.policy = self.policy or built_on_all_ranks(lambda: self._build_policy(is_empty))
        self.policy.shard(mesh, self.trainer.strategy.root_device)

    def _build_policy(self, is_empty: bool = False) -> Policy:
        folder, with_critic = self.learner.served_model.folder, self.loss_config.parts.advantage == "gae"
        return Policy(self.policy_config, folder, self.loss_config.beta > 0, with_critic, is_empty).train()

    def setup(self, stage: str) -> None:
        """Resets what an earlier run loaded from its checkpoint. Lightning loads the checkpoint of this run later."""
        if stage == "fit":
            self.loaded_step, self.loaded_micro_batches, self.resumed = 0, None, None

    def configure_optimizers(self) -> Any:
        """The optimizer of the trained weights, with the scheduler if there is one."""
        optimizer = self.optimizer(self._policy.trainable_parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": lightning_config(self.lr_scheduler(optimizer), self.trainer)}

    def check_run(self, trainer: Trainer) -> None:
        """Checks the settings of sharding, optimizer and scheduler before the engine starts.

        Raises:
            ConfigError: A setting is invalid.
        """
        check_sharded(trainer, self.policy_config)
        if trainer.is_global_zero:
            warn_of_slow_bfloat16(trainer.strategy.root_device, self.policy_config.dtype, trainer.precision)
        if trainer.state.fn == TrainerFn.FITTING:
            check_optimization(self.optimizer, self.lr_scheduler, trainer)

    def on_fit_start(self) -> None:
        """Checks that the trainer's precision keeps the trained weights in float32.

        Raises:
            ConfigError: The trained weights are not float32.
        """
        rounded = {str(p.dtype) for p in self._policy.trainable_parameters() if p.dtype != torch.float32}
        if rounded:
            raise ConfigError(
                f"the trained weights are {sorted(rounded)}, and must be float32: trainer.precision is "
                f"{self.trainer.precision!r}, use 32-true or bf16-mixed (frozen weights have model.policy.dtype either way)"
            )

    def on_train_start(self) -> None:
        """Checks the number of micro-batches per step: Lightning counts the progress of a run in micro-batches.

        Raises:
            ConfigError: The checkpoint was saved with another number.
        """
        number = self.trainer.accumulate_grad_batches
        if self.loaded_micro_batches not in (None, number):
            raise ConfigError(
                f"the checkpoint has {self.loaded_micro_batches} micro-batches per step, and this run has {number}: set "
                f"trainer.accumulate_grad_batches to {self.loaded_micro_batches}, or start a new run from the adapter of the "
                "checkpoint's run with model.policy.lora.init_from"
            )

    @property
    def shares_prefix(self) -> bool:
        """Whether the forward pass computes the common prefix of siblings only once."""
        return self._policy.shares_prefix

    @property
    def max_tokens_per_micro_batch(self) -> int | None:
        """Token budget that determines the number of micro-batches, or None."""
        return self.policy_config.max_tokens_per_micro_batch

    def rehearse(self, batch: Batch) -> None:
        """Runs forward and backward on a micro-batch without side effects on gradients, metrics or random state."""
        with own_randomness(batch.dropout_seed, self.device):
            with self.trainer.precision_plugin.forward_context():
                reference = self._policy.reference_logprobs(batch) if self.loss_config.kl_in_loss else None
                policy_output = self._policy.output(batch)
                old_logprobs = policy_output.logprobs.detach()
                loss = policy_loss(self.loss_config, batch, policy_output, old_logprobs, old_logprobs, reference).loss
            loss.backward()
        self._policy.zero_grad(set_to_none=True)

    @torch.no_grad()
    def trainer_signals(self, batches: list[Batch]) -> list[TrainerSignals]:
        """Logprobs, KL and critic values of micro-batches, for the objectives that need them; see `TrainerSignals`."""
        # The data loader calls this outside of a step, where Lightning does not apply the precision.
        with self.trainer.precision_plugin.forward_context():
            return [trainer_signals(self._policy, self.loss_config, batch) for batch in batches]

    @torch.no_grad()
    def teacher_logprobs(self, batches: list[Batch]) -> list[Tensor]:
        """Logprobs of micro-batches by the teacher's adapter, or without one by the reference."""
        with self.trainer.precision_plugin.forward_context():
            return [self._policy.teacher_logprobs(batch, self.teacher) for batch in batches]

    def use_teacher(self, adapter: str | None) -> None:
        """Loads the adapter of a teacher, None for none. See `SignalSource.use_teacher`."""
        self.teacher = None if adapter is None else TeacherAdapter(adapter, self.learner.served_model.folder)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch, scaled so that the averages of Lightning and DDP sum to the loss of the step.

        Raises:
            StaleBatchError: The batch was sampled with weights that are too old.
        """
        info = batch.step
        info.check_age(self.global_step)
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        if micro_batch == 0:
            self._begin_step(info)
        if not batch.has_rows:
            return self._loss_without_rows(batch)
        self._policy.end_accumulation(micro_batch + 1 == self.trainer.accumulate_grad_batches)
        self.ref_logprobs = self._policy.reference_logprobs(batch) if self.loss_config.kl_in_loss else None
        with own_randomness(batch.dropout_seed, self.device):
            policy_output = self._policy.output(batch)
        if info.phase_step == 0:
            # The engine samples without dropout, so the logprobs compared with its own must have none.
            evaluated = self._policy.evaluated_output(batch) if self._policy.has_dropout else policy_output
            self.trainer_logprobs.append(evaluated.logprobs.detach())
        trainer_logprobs = self.trainer_logprobs[micro_batch]
        # At the first update one forward computes both logprobs: the ratio is exactly 1, and dropout clips no token.
        old_logprobs = policy_output.logprobs.detach() if info.phase_step == 0 else trainer_logprobs
        output = policy_loss(self.loss_config, batch, policy_output, old_logprobs, trainer_logprobs, self.ref_logprobs)
        gap = logprob_gap(batch, trainer_logprobs)
        for name, value in {**output.metrics, "train/logprob_gap": gap}.items():
            combine = torch.maximum if name.endswith("_max") else torch.add
            self.step_metrics[name] = combine(self.step_metrics.get(name, torch.zeros_like(value)), value)
        self.rollout_metrics, self.skip_reason = info.metrics, info.skip_reason
        # The loss is already divided by the counts of the whole step. Lightning divides again by the number of
        # micro-batches, and DDP and FSDP divide by the number of ranks.
        return output.loss * (self.trainer.accumulate_grad_batches * self.num_ranks)

    def _loss_without_rows(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch that the step does not need, a constant 0. Nothing is computed for it.

        Lightning takes None for an error where there are several ranks, and warns of it on one.
        """
        if batch.step.phase_step == 0:
            self.trainer_logprobs.append(batch.sampling_logprobs)
        return torch.zeros((), device=self.device, requires_grad=True)

    def _begin_step(self, info: StepInfo) -> None:
        """Selects the trainer's logprobs of the step. Before a phase's first update, computes those of its later mini-batches."""
        if info.phase_step == 0:
            later = [self._evaluated_logprobs(batch.to(self.device)) for batch in info.later]
            size = self.trainer.accumulate_grad_batches
            self.phase_logprobs = [[], *(later[start : start + size] for start in range(0, len(later), size))]
        self.trainer_logprobs = self.phase_logprobs[info.phase_step % self.loss_config.mini_batches]

    def _evaluated_logprobs(self, batch: Batch) -> Tensor:
        return self._policy.evaluated_output(batch).logprobs if batch.has_rows else batch.sampling_logprobs

    def ends_phase(self, batch_idx: int) -> bool:
        """Whether micro-batch `batch_idx`, which has been trained, completed the last optimizer step of its phase."""
        completed_step = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        return completed_step and self.global_step % self.loss_config.steps_per_phase == 0

    @property
    def num_ranks(self) -> int:
        """Number of ranks over which the strategy averages gradients."""
        return self.trainer.world_size

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the metrics of the step: sums over micro-batches, and the gradient norm before clipping.

        A skipped step gets no gradients: an optimizer changes neither a weight without a gradient nor its state.
        """
        reduce = self.trainer.strategy.reduce  # in place on some strategies, hence the copies
        shares = {
            name: reduce(value.clone(), reduce_op="max" if name.endswith("_max") else "sum")
            for name, value in self.step_metrics.items()
        }
        gradients = [p.grad for p in self._policy.trainable_parameters() if p.grad is not None]
        shares["train/grad_norm"] = total_norm(gradients)
        shares["train/skipped"] = torch.tensor(float(self.skip_reason is not None))
        if self.skip_reason is not None:
            # Counted from 1, as on the console.
            logger.warning(
                "step %d is skipped, the weights stay as they are: %s", self.global_step + 1, self.skip_reason
            )
            optimizer.zero_grad(set_to_none=True)
        self.log_dict({**shares, **self.rollout_metrics})
        self.step_metrics.clear()

    def validation_step(self, batch: Evaluation, batch_idx: int) -> None:
        """Logs held-out metrics under `validation/`."""
        self._log_evaluation("validation", batch)

    def test_step(self, batch: Evaluation, batch_idx: int) -> None:
        """Logs held-out metrics under `test/`."""
        self._log_evaluation("test", batch)

    def predict_step(self, batch: Evaluation, batch_idx: int) -> list[str]:
        """The completions of the held-out items, in order; `rollouts-predict.jsonl` contains the whole rollouts."""
        return [rollout.completion for rollout in batch.rollouts]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trained weights only, and adds what a resumed run is checked against."""
        trained = self._trained_shapes()
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in trained}
        # Lightning loads sharded weights before it calls `on_load_checkpoint`, and removes them from the checkpoint.
        checkpoint[SHAPES_KEY] = trained
        checkpoint[OPTIMIZER_SHAPES_KEY] = optimizer_shapes(checkpoint)
        checkpoint[MICRO_BATCHES_KEY] = self.trainer.accumulate_grad_batches
        checkpoint[OPTIMIZATION_KEY] = self.recipe.described() if self.resumed is None else self.resumed.optimization
        checkpoint[SETTINGS_KEY] = {"policy": asdict(self.policy_config), "loss": asdict(self.loss_config)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the run can resume from a checkpoint, and applies the choice between its optimizer and the config's.

        Raises:
            ConfigError: The config trains other weights, the checkpoint was saved within a step or a phase, or its optimizer
                differs from the config's and `resume` chooses neither.
        """
        # Without a state_dict it is a sharded checkpoint, whose weights are already loaded.
        if "state_dict" in checkpoint or any(key not in checkpoint for key in OWN_KEYS):
            check_contents(checkpoint, "that was given")
        check_trained(self._trained_shapes(), checkpoint)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self.resumed = self.check_resume(checkpoint)
            self.resumed.put_into(checkpoint)
            begin_next_epoch(checkpoint)
            if not self._trainer.strategy.lightning_restore_optimizer:  # FSDP2 restores them with the weights
                for optimizer in self._trainer.optimizers:
                    self.resumed.apply(optimizer)
        elif AVERAGED_WEIGHTS in checkpoint:
            if self.device_mesh is not None:  # the sharded weights are already loaded
                raise ConfigError(
                    "the checkpoint holds averaged weights (WeightAverage), which sharded weights cannot take: leave out "
                    "FSDP2Strategy, or export the run's adapter/ and start from it with model.policy.lora.init_from"
                )
            checkpoint["state_dict"] = checkpoint[AVERAGED_WEIGHTS]
        self.loaded_step, self.loaded_micro_batches = checkpoint["global_step"], checkpoint[MICRO_BATCHES_KEY]

    def check_resume(self, checkpoint: Mapping[str, Any]) -> Resumed:
        """The optimizer and schedule settings that a resumed run uses.

        Raises:
            ConfigError: The run cannot resume from the checkpoint, see `on_load_checkpoint`.
        """
        check_between_phases(checkpoint, self.loss_config.steps_per_phase)
        return resumed(checkpoint, self.recipe, self.resume_choice)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's takes any keyword
        cls, checkpoint_path: str | Path, policy: PolicyConfig | None = None, loss: LossConfig | None = None
    ) -> Self:
        """Loads model and trained weights of a checkpoint on the CPU. To continue training, pass `ckpt_path` to `Trainer.fit`.

        Args:
            checkpoint_path: A checkpoint file.
            policy: The model, by default that of the checkpoint. Its trained weights must have the same names and shapes.
            loss: The objective, by default that of the checkpoint.

        Raises:
            ConfigError: The file is not a checkpoint, or its weights are not those of the policy.
        """
        path = Path(checkpoint_path)
        checkpoint = read_checkpoint(path)
        if "state_dict" not in checkpoint:
            raise ConfigError(
                f"the checkpoint {path} is a folder of parts, which FSDP2Strategy alone loads: give a file"
            )
        stored = parsed_settings(checkpoint[SETTINGS_KEY])
        module = cls(policy or stored["policy"], loss or stored["loss"])
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
        return module

    @property
    def recipe(self) -> Recipe:
        """The constructors of optimizer and schedule."""
        return Recipe(self.optimizer, self.lr_scheduler)

    @property
    def _policy(self) -> Policy:
        assert self.policy is not None, "configure_model comes first"
        return self.policy

    def _trained_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.named_parameters() if p.requires_grad}

    def _log_evaluation(self, split: str, batch: Evaluation) -> None:
        metrics = {f"{split}/{name}": value for name, value in batch.metrics.items()}
        # All ranks have the same figures, and each counts once: a weighted mean of equal numbers would round them.
        self.log_dict(metrics, batch_size=1, on_step=False, on_epoch=True, sync_dist=True)
