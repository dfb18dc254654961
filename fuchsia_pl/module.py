"""The LightningModule: a micro-batch becomes logprobs, logprobs a loss, and losses the metrics of an optimizer step."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fuchsia_pl.batch import Batch, TrainerSignals
from fuchsia_pl.objectives.config import Learner, LossConfig
from fuchsia_pl.objectives.kl import kl_estimate
from fuchsia_pl.objectives.loss import logprob_gap, policy_loss
from fuchsia_pl.policy.checkpoint_files import (
    MICRO_BATCHES_KEY,
    OPTIMIZATION_KEY,
    OPTIMIZER_SHAPES_KEY,
    OWN_KEYS,
    SETTINGS_KEY,
    SHAPES_KEY,
    check_between_phases,
    check_contents,
    check_trained,
    optimizer_shapes,
    read_checkpoint,
)
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.contents import AVERAGED_WEIGHTS
from fuchsia_pl.policy.cpu import warn_of_slow_bfloat16
from fuchsia_pl.policy.optimization import Recipe, ResumeChoice, Resumed, resumed
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.policy.schedules import check_optimization, lightning_config
from fuchsia_pl.policy.sharding import total_norm
from fuchsia_pl.policy.sources import read_template, resolve_model
from fuchsia_pl.types import ConfigError, Evaluation, ServedModel

logger = logging.getLogger(__name__)


class StaleBatchError(RuntimeError):
    """A batch was sampled with other weights than those about to be trained."""


class GRPOModule(LightningModule):
    """Trains a policy on batches of rollouts, by GRPO or one of its relatives.

    Optimisation is Lightning's own: gradient clipping, accumulation, precision and schedulers are set on the trainer and
    mean what they always mean.

    Args:
        policy: The model that learns.
        loss: What is optimised.
        optimizer: Made from the trained weights.
        lr_scheduler: Made from the optimizer, stepped once per optimizer step (one that watches a held-out figure, once per
            validation); None keeps the learning rate.

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
        self.step_metrics: dict[str, Tensor] = {}
        self.rollout_metrics: Mapping[str, float] = {}
        self.loaded_step = 0
        self.loaded_micro_batches: int | None = None
        self.resume_choice = ResumeChoice()
        self.resumed: Resumed | None = None
        self.skip_reason: str | None = None
        # Of each micro-batch, the trainer's logprobs before the first update of a phase; of the newest, the reference's.
        self.trainer_logprobs: list[Tensor] = []
        self.ref_logprobs: Tensor | None = None
        # A checkpoint holds what was trained and never the base weights.
        self.strict_loading = False

    def configure_model(self) -> None:
        """Loads the model, once per process, where Lightning's strategies want it loaded.

        Raises:
            ConfigError: The model cannot be trained as the config says, or the strategy does not average over all ranks.
        """
        if self.policy is None:
            self.policy = Policy(
                self.policy_config,
                self.learner.served_model.folder,
                with_reference=self.loss_config.beta > 0,
                with_critic=self.loss_config.parts.advantage == "gae",
            )
            self.policy.train()
        if self.device_mesh is None or self.policy.is_sharded:
            return
        mesh = self.device_mesh["data_parallel"]
        if mesh.size() != self.trainer.world_size:
            raise ConfigError(
                f"trainer.strategy averages over {mesh.size()} of {self.trainer.world_size} ranks, which would train "
                "apart: use fuchsia_pl.policy.sharding.FSDP2Strategy (--config overlays/fsdp.yaml), or ddp"
            )
        self.policy.shard(mesh)

    def setup(self, stage: str) -> None:
        """Forgets the checkpoint of an earlier run of this module; that of this run is loaded after this."""
        if stage == "fit":
            self.loaded_step, self.loaded_micro_batches, self.resumed = 0, None, None

    def configure_optimizers(self) -> Any:
        """The optimizer over the trained weights, with the scheduler if there is one."""
        optimizer = self.optimizer(self._policy.trainable_parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": lightning_config(self.lr_scheduler(optimizer), self.trainer)}

    def check_run(self, trainer: Trainer) -> None:
        """Refuses, before the engine starts, settings of optimizer and scheduler that cannot be.

        Raises:
            ConfigError: There is one.
        """
        if trainer.is_global_zero:
            warn_of_slow_bfloat16(trainer.strategy.root_device, self.policy_config.dtype, trainer.precision)
        if trainer.state.fn == TrainerFn.FITTING:
            check_optimization(self.optimizer, self.lr_scheduler, trainer)

    def on_fit_start(self) -> None:
        """Refuses a precision that would round the trained weights.

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
        """Refuses to go on with another number of micro-batches: Lightning counts how far a run is in these.

        Raises:
            ConfigError: The checkpoint's number is another one.
        """
        number = self.trainer.accumulate_grad_batches
        if self.loaded_micro_batches not in (None, number):
            raise ConfigError(
                f"the checkpoint counts {self.loaded_micro_batches} micro-batches a step, and this run has {number}: "
                f"set trainer.accumulate_grad_batches to {self.loaded_micro_batches}, or start anew from the adapter of that "
                "run with model.policy.lora.init_from"
            )

    @property
    def shares_prefix(self) -> bool:
        """Whether what siblings have in common is computed once."""
        return self._policy.shares_prefix

    @property
    def max_tokens_per_micro_batch(self) -> int | None:
        """The budget that decides the number of micro-batches, if there is one."""
        return self.policy_config.max_tokens_per_micro_batch

    def rehearse(self, batch: Batch) -> None:
        """Runs a micro-batch forward and backward and leaves nothing behind: no gradient, no metric, no number drawn."""
        with self._own_randomness(batch.dropout_seed):
            with self.trainer.precision_plugin.forward_context():
                reference = self._policy.reference_logprobs(batch) if self.loss_config.kl_in_loss else None
                policy_output = self._policy.output(batch)
                old_logprobs = policy_output.logprobs.detach()
                loss = policy_loss(self.loss_config, batch, policy_output, old_logprobs, old_logprobs, reference).loss
            loss.backward()
        self._policy.zero_grad(set_to_none=True)

    @torch.no_grad()
    def trainer_signals(self, batches: list[Batch]) -> list[TrainerSignals]:
        """KL and values of the tokens of some micro-batches, where advantages need them; without dropout."""
        # The data loader calls this outside of a step, where Lightning's precision is not in force.
        with self.trainer.precision_plugin.forward_context():
            return [self._signals(batch) for batch in batches]

    def _signals(self, batch: Batch) -> TrainerSignals:
        policy_output = self._policy.evaluated_output(batch)
        if not self.loss_config.kl_in_reward:
            return TrainerSignals(None, policy_output.values)
        reference = self._policy.reference_logprobs(batch)
        kl = kl_estimate(self.loss_config.parts.kl_estimator, policy_output.logprobs, reference, policy_output.logprobs)
        return TrainerSignals(kl, policy_output.values)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch, scaled so that Lightning's and DDP's averages make it the whole step's.

        Raises:
            StaleBatchError: The batch was sampled with other weights.
        """
        info = batch.step
        if not 0 <= self.global_step - info.policy_update - info.policy_version <= info.max_staleness:
            raise StaleBatchError(
                f"step {self.global_step} got rollouts of policy version {info.policy_version} for update "
                f"{info.policy_update} of their phase, and {info.max_staleness} steps are the most that they may lie apart: "
                "the data loader ran ahead of the trainer, or the engine was not synced"
            )
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        self._policy.end_accumulation(micro_batch + 1 == self.trainer.accumulate_grad_batches)
        self.ref_logprobs = self._policy.reference_logprobs(batch) if self.loss_config.kl_in_loss else None
        with self._own_randomness(batch.dropout_seed):
            policy_output = self._policy.output(batch)
        if info.policy_update == 0:
            # What sampled drops nothing out, so what is compared with it must not either.
            evaluated = self._policy.evaluated_output(batch) if self._policy.has_dropout else policy_output
            self.trainer_logprobs = [*self.trainer_logprobs[:micro_batch], evaluated.logprobs.detach()]
        trainer_logprobs = self.trainer_logprobs[micro_batch]
        # At the first update both sides of the ratio are one forward: it is exactly 1, and dropout clips no token.
        old_logprobs = policy_output.logprobs.detach() if info.policy_update == 0 else trainer_logprobs
        output = policy_loss(self.loss_config, batch, policy_output, old_logprobs, trainer_logprobs, self.ref_logprobs)
        gap = logprob_gap(batch, trainer_logprobs)
        for name, value in {**output.metrics, "train/logprob_gap": gap}.items():
            combine = torch.maximum if name.endswith("_max") else torch.add
            self.step_metrics[name] = combine(self.step_metrics.get(name, torch.zeros_like(value)), value)
        self.rollout_metrics, self.skip_reason = info.metrics, info.skip_reason
        # The loss is divided by the whole step's counts already; Lightning divides by the number of micro-batches once
        # more, and DDP and FSDP by the number of ranks.
        return output.loss * (self.trainer.accumulate_grad_batches * self.num_ranks)

    @property
    def num_ranks(self) -> int:
        """Number of ranks over which the strategy averages gradients."""
        return self.trainer.world_size

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the step's metrics: sums of the micro-batches' shares, and the gradient's norm before clipping.

        A step to be skipped loses its gradients: without one, an optimizer leaves a weight and its own state as they are.
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
        """Logs the held-out figures under `validation/`."""
        self._log_evaluation("validation", batch)

    def test_step(self, batch: Evaluation, batch_idx: int) -> None:
        """Logs the held-out figures under `test/`."""
        self._log_evaluation("test", batch)

    def predict_step(self, batch: Evaluation, batch_idx: int) -> list[str]:
        """The completions of the held-out items, in order; `rollouts-predict.jsonl` has all about them."""
        return [rollout.completion for rollout in batch.rollouts]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trained weights only."""
        trained = self._trained_shapes()
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in trained}
        # Sharded weights are loaded before this module is asked, and are no longer in the checkpoint then.
        checkpoint[SHAPES_KEY] = trained
        checkpoint[OPTIMIZER_SHAPES_KEY] = optimizer_shapes(checkpoint)
        checkpoint[MICRO_BATCHES_KEY] = self.trainer.accumulate_grad_batches
        checkpoint[OPTIMIZATION_KEY] = self.recipe.described() if self.resumed is None else self.resumed.optimization
        checkpoint[SETTINGS_KEY] = {"policy": asdict(self.policy_config), "loss": asdict(self.loss_config)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses what cannot be continued from, and puts the config's optimizer and schedule in where that was chosen.

        Raises:
            ConfigError: The checkpoint's weights are not those that this config trains, it was saved within a step or a phase,
                or nothing decides between its optimizer and the config's.
        """
        if "state_dict" in checkpoint or any(
            key not in checkpoint for key in OWN_KEYS
        ):  # a folder's weights are loaded by now
            check_contents(checkpoint, "that was given")
        check_trained(self._trained_shapes(), checkpoint)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self.resumed = self.check_resume(checkpoint)
            self.resumed.put_into(checkpoint)
            if not self._trainer.strategy.lightning_restore_optimizer:  # FSDP2 restores them with the weights
                for optimizer in self._trainer.optimizers:
                    self.resumed.apply(optimizer)
        elif AVERAGED_WEIGHTS in checkpoint:
            if self.device_mesh is not None:  # whose weights were loaded before this module is asked
                raise ConfigError(
                    "the checkpoint holds averaged weights (WeightAverage), which sharded weights cannot take: leave out "
                    "FSDP2Strategy, or export the run's adapter/ and start from it with model.policy.lora.init_from"
                )
            checkpoint["state_dict"] = checkpoint[AVERAGED_WEIGHTS]
        self.loaded_step, self.loaded_micro_batches = checkpoint["global_step"], checkpoint[MICRO_BATCHES_KEY]

    def check_resume(self, checkpoint: Mapping[str, Any]) -> Resumed:
        """What a run would continue with.

        Raises:
            ConfigError: It cannot continue from there, see `on_load_checkpoint`.
        """
        check_between_phases(checkpoint, self.loss_config.num_policy_updates)
        return resumed(checkpoint, self.recipe, self.resume_choice)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's takes any keyword
        cls, checkpoint_path: str | Path, policy: PolicyConfig | None = None, loss: LossConfig | None = None
    ) -> Self:
        """The module with the trained weights of a checkpoint, on the CPU, with its model loaded.

        Optimizer and schedule are the defaults: to train on, make a module and give `Trainer.fit` the `ckpt_path`.

        Args:
            checkpoint_path: A file that a run wrote.
            policy: The model, by default that of the checkpoint's run. The trained weights must be the same.
            loss: The objective, by default that of the checkpoint's run.

        Raises:
            ConfigError: It is no such file, or of other weights.
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
        """What makes optimizer and schedule."""
        return Recipe(self.optimizer, self.lr_scheduler)

    @contextmanager
    def _own_randomness(self, seed: int) -> Iterator[None]:
        """Dropout by the address of a micro-batch: a resumed run drops what the run that it resumes would have."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    @property
    def _policy(self) -> Policy:
        assert self.policy is not None, "configure_model comes first"
        return self.policy

    def _trained_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.named_parameters() if p.requires_grad}

    def _log_evaluation(self, split: str, batch: Evaluation) -> None:
        metrics = {f"{split}/{name}": value for name, value in batch.metrics.items()}
        self.log_dict(metrics, batch_size=max(len(batch.rollouts), 1), on_step=False, on_epoch=True, sync_dist=True)


def parsed_settings(settings: Mapping[str, Any]) -> Any:
    """The configs that a checkpoint holds as plain data."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=PolicyConfig)
    parser.add_argument("--loss", type=LossConfig)
    return parser.instantiate(parser.parse_object(dict(settings)))
