"""The LightningModule: a micro-batch becomes logprobs, logprobs a loss, and losses the metrics of an optimizer step."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from fuchsia_pl.objectives.loss import LossConfig, logprob_gap, policy_loss
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.policy.sources import resolve_model
from fuchsia_pl.types import Batch, ConfigError, Evaluation, ServedModel

RNG_KEY = "torch_rng_state"


class StaleBatchError(RuntimeError):
    """A batch was sampled with other weights than those about to be trained."""


class GRPOModule(LightningModule):
    """Trains a policy on batches of rollouts (GRPO, arXiv:2402.03300).

    Optimisation is Lightning's own: gradient clipping, accumulation, precision and schedulers are set on the trainer and
    mean what they always mean.

    Args:
        policy: The model that learns.
        loss: What is optimised.
        optimizer: Made from the trained weights.
        lr_scheduler: Made from the optimizer, stepped once per optimizer step; None keeps the learning rate.

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
        self.served_model = ServedModel(policy.name, policy.dtype, lora_rank, resolve_model)
        self.policy: Policy | None = None
        self.step_metrics: dict[str, Tensor] = {}
        self.rollout_metrics: Mapping[str, float] = {}
        self.loaded_step = 0
        # A checkpoint holds what was trained and never the base weights.
        self.strict_loading = False

    def configure_model(self) -> None:
        """Loads the model, once per process, where Lightning's strategies want it loaded."""
        if self.policy is None:
            self.policy = Policy(self.policy_config, self.served_model.folder, with_reference=self.loss_config.beta > 0)
            self.policy.train()

    def configure_optimizers(self) -> Any:
        """The optimizer over the trained weights, with the scheduler if there is one."""
        optimizer = self.optimizer(self._policy.trainable_parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    def on_fit_start(self) -> None:
        """Refuses a precision that would round the trained weights.

        Raises:
            ConfigError: The trained weights are not float32.
        """
        rounded = {str(p.dtype) for p in self._policy.trainable_parameters() if p.dtype != torch.float32}
        if rounded:
            raise ConfigError(
                f"the trained weights are {sorted(rounded)}, in which small updates are lost: trainer.precision is "
                f"{self.trainer.precision!r}, use 32-true or bf16-mixed (frozen weights have model.policy.dtype either way)"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch, scaled so that Lightning's and DDP's averages make it the whole step's.

        Raises:
            StaleBatchError: The batch was sampled with other weights.
        """
        if batch.policy_version != self.global_step:
            raise StaleBatchError(
                f"step {self.global_step} got rollouts of policy version {batch.policy_version}: the data loader ran ahead of "
                "the trainer, or the engine was not synced"
            )
        ref_logprobs = self._policy.reference_logprobs(batch) if self.loss_config.beta > 0 else None
        policy_logprobs = self._policy.logprobs(batch)
        output = policy_loss(self.loss_config, batch, policy_logprobs, ref_logprobs)
        # The engine drops nothing out, so it is compared with a forward that does not either.
        compared = self._policy.evaluated_logprobs(batch) if self._policy.has_dropout else policy_logprobs
        for name, value in {**output.metrics, "train/logprob_gap": logprob_gap(batch, compared)}.items():
            self.step_metrics[name] = self.step_metrics.get(name, torch.zeros_like(value)) + value
        self.rollout_metrics = batch.metrics
        # The loss is divided by the whole step's counts already; Lightning divides by the number of micro-batches once
        # more, and DDP and FSDP by the number of ranks.
        return output.loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the step's metrics: sums of the micro-batches' shares, and the gradient's norm before clipping."""
        reduce = self.trainer.strategy.reduce  # in place on some strategies, hence the copies
        shares = {name: reduce(value.clone(), reduce_op="sum") for name, value in self.step_metrics.items()}
        gradients = [p.grad for p in self._policy.trainable_parameters() if p.grad is not None]
        shares["train/grad_norm"] = torch.nn.utils.get_total_norm(gradients)
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
        """Keeps the trained weights only, and the state of torch's generator (LoRA dropout draws from it)."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in trained}
        checkpoint[RNG_KEY] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the generator, and refuses a checkpoint of another adapter.

        Raises:
            ConfigError: The checkpoint's weights are not those that this config trains.
        """
        trained = {name: p.shape for name, p in self.named_parameters() if p.requires_grad}
        found = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
        if trained != found:
            raise ConfigError(
                f"the checkpoint holds {len(found)} trained tensors, this config trains {len(trained)}, and names or shapes "
                f"differ, first at {_first_difference(trained, found)}: use the config.yaml of the run that wrote it"
            )
        torch.set_rng_state(checkpoint[RNG_KEY])
        self.loaded_step = checkpoint["global_step"]

    @property
    def _policy(self) -> Policy:
        assert self.policy is not None, "configure_model comes first"
        return self.policy

    def _log_evaluation(self, split: str, batch: Evaluation) -> None:
        metrics = {f"{split}/{name}": value for name, value in batch.metrics.items()}
        self.log_dict(metrics, batch_size=max(len(batch.rollouts), 1), on_step=False, on_epoch=True, sync_dist=True)


def _first_difference(trained: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> str:
    names = sorted(name for name in trained.keys() | found.keys() if trained.get(name) != found.get(name))
    return f"{names[0]} (trained {trained.get(names[0])}, found {found.get(names[0])})"
