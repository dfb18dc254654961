"""Keeps the engine on the trainer's weights, and stops the run where it is not."""

import logging
import math
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fuchsia_pl.batch import Batch
from fuchsia_pl.engines.base import VERSION_FILE, EngineOwner
from fuchsia_pl.files import roomy_folder, writing
from fuchsia_pl.loop import run_blocking
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.agreement import Agreement, adapter_agreement
from fuchsia_pl.policy.contents import fingerprint
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.scratch import scratch_folder
from fuchsia_pl.stopping import Stopped, stopping
from fuchsia_pl.types import ConfigError

GAP_METRIC = "train/logprob_gap"
MAX_PROBES = 6
MIN_STEPS_PER_LAG = 4
SYNC_OVERHEAD_BYTES = 1 << 20  # config, index and tokenizer files

logger = logging.getLogger(__name__)


class SyncError(RuntimeError):
    """The engine does not sample from the weights that are trained."""


class SyncedModule(Protocol):
    """What this callback knows of the module."""

    policy: Policy
    loss_config: LossConfig
    step_metrics: dict[str, Tensor]
    trainer_logprobs: list[Tensor]
    ref_logprobs: Tensor | None
    loaded_step: int
    skip_reason: str | None


class AdapterSync(Callback):
    """Gives the engine the newest weights once per optimizer step (or phase of them), and before any sampling starts.

    The order for step k: batch k is sampled with version k, its micro-batches run backward, `optimizer.step` makes version
    k + 1, this callback writes and loads version k + 1, and only then does the data loader ask for batch k + 1.

    Agreement is checked in two ways. Before every update, the mean |policy logprob - sampling logprob| of the step's
    tokens must stay within `tolerance`. And on the first rollouts that were sampled with trained weights (also after a
    resume), what the engine did to the logprobs is compared with what the adapter does to them in the trainer: a bad scale
    or an adapter that never arrived shows there, long before the gap grows. That probe needs a reference, so it is not made
    where all weights are trained with `beta: 0`.

    Args:
        tolerance: Largest mean gap in nats. On a CPU in bfloat16, 0.03 to 0.08 is rounding. Where sampling runs ahead of
            training, once more for each step that the batch lies behind.

    Raises:
        ConfigError: The tolerance is not above 0.
    """

    def __init__(self, tolerance: float = 0.2) -> None:
        if tolerance <= 0:
            raise ConfigError(f"adapter_sync.tolerance must be above 0, got {tolerance}")
        self.tolerance = tolerance
        self.agreement: Agreement | None = None
        self._lag = 0
        self._num_asked = 0
        self._num_probes = 0
        self._probed: Batch | None = None
        self._root: tempfile.TemporaryDirectory[str] | None = None
        self._loaded: tuple[int, tuple[int, ...]] | None = None  # version and content of what the engine has

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step 0, or the first after a resume, is sampled with the weights it trains."""
        self.sync(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Held-out figures are of the weights at hand, those that another callback has put in at the start included."""
        self.sync(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is sampled for training next is sampled with the weights that learn, where others were put in for validation."""
        self.sync(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`fuchsia test` samples with the checkpoint's weights."""
        self.sync(trainer, pl_module)

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`fuchsia predict` samples with the checkpoint's weights."""
        self.sync(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Chooses what to probe: the first rollouts of trained weights, and later ones while the effect is lost in rounding.

        Raises:
            SyncError: The weights are not those that were synced last.
        """
        policy = cast(SyncedModule, pl_module).policy
        self._probed = None
        first_of_step = batch_idx % trainer.accumulate_grad_batches == 0 and batch.step.policy_update == 0
        if first_of_step:
            self._check_content(trainer, policy)
        self._lag = trainer.global_step - batch.step.policy_update - batch.step.policy_version
        # What sampled is compared with what is trained now, so the steps between them must be few beside those that trained.
        is_comparable = batch.step.policy_version > MIN_STEPS_PER_LAG * self._lag
        if self.agreement is not None or not (first_of_step and policy.has_reference and is_comparable):
            return
        self._num_asked += 1
        if self._num_probes == MAX_PROBES or self._num_asked.bit_count() > 1:
            return  # it may cost a forward, so the 1st, 2nd, 4th, 8th, … of these steps are probed
        self._num_probes += 1
        self._probed = batch

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probes with the logprobs that the step has computed anyway, and the reference's where it has them too.

        Raises:
            SyncError: The engine does not do to logprobs what the adapter does.
        """
        batch, self._probed = self._probed, None
        if batch is None:
            return
        module, mask = cast(SyncedModule, pl_module), batch.loss_mask
        reference = module.ref_logprobs
        if reference is None:
            with trainer.precision_plugin.forward_context():  # a callback is outside of the step's
                reference = module.policy.reference_logprobs(batch)
        agreement = adapter_agreement(
            module.trainer_logprobs[0][mask],
            reference[mask],
            batch.sampling_logprobs[mask],
            lambda sums: trainer.strategy.reduce(sums, reduce_op="sum"),
        )
        if not agreement.is_conclusive:
            if self._num_probes == MAX_PROBES:
                logger.warning(
                    "%d probes saw no effect of the adapter beside the rounding: it hardly learns", MAX_PROBES
                )
            return
        self.agreement = agreement
        if not agreement.holds:
            raise SyncError(
                f"the engine applies {agreement.slope:.2f} of the adapter (±{agreement.error:.2f}; 1 is right, 0 means that it "
                f"samples from the base model) to rollouts of policy version {batch.step.policy_version}. Check that engine and "
                "trainer load the same model, and that sync_mode suits the engine"
            )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Refuses to train on samples of another policy.

        Raises:
            SyncError: The step's mean gap is above the tolerance, or not a number.
        """
        module = cast(SyncedModule, pl_module)
        gap = float(trainer.strategy.reduce(module.step_metrics[GAP_METRIC].clone(), reduce_op="sum"))
        if not math.isfinite(gap) and module.skip_reason is not None:
            return  # FiniteGuard has met the numbers that it comes from
        allowed = self.tolerance * (1 + self._lag)
        if not gap <= allowed:
            raise SyncError(
                f"engine and trainer disagree at step {trainer.global_step}: the mean |policy logprob - sampling logprob| is "
                f"{gap:.3f}, and adapter_sync.tolerance allows {allowed:g}. The engine may sample from other weights "
                "(was the adapter loaded? is it the same model and dtype?) or from another distribution. Nothing was "
                "updated in this step. If the gap is rounding of a low precision, raise --adapter_sync.tolerance"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Syncs at the end of a phase: only then are rollouts sampled again."""
        if stopping.is_agreed or not ends_phase(trainer, pl_module, batch_idx):
            return  # a run that was told to end samples no more
        with suppress(Stopped):  # on all ranks: no phase begins after this one, whose metrics are yet to be written
            seconds = self.sync(trainer, pl_module)
            if seconds is not None:
                pl_module.log("sync/seconds", seconds)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the folder; that of a run that failed goes with the interpreter."""
        if self._root is not None:
            self._root.cleanup()
            self._root = None

    def _check_content(self, trainer: Trainer, policy: Policy) -> None:
        changed = self._loaded is None or fingerprint(policy.trainable_parameters()) != self._loaded[1]
        if num_ranks_where(trainer, changed):
            raise SyncError(
                "the trained weights were changed outside of the optimizer after the engine got those of step "
                f"{trainer.global_step}, so the rollouts are not of the weights that would learn from them. A callback that "
                "changes weights must stand before AdapterSync in the trainer's callbacks"
            )

    def sync(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        """Loads the current weights into the engine unless it has them; returns the seconds that took."""
        module = cast(SyncedModule, pl_module)
        version = trainer.global_step if trainer.state.fn == TrainerFn.FITTING else module.loaded_step
        owner = cast(EngineOwner, trainer.datamodule)  # type: ignore[attr-defined]
        engine = owner.engine
        loaded = (version, fingerprint(module.policy.trainable_parameters()))
        if not num_ranks_where(trainer, engine.policy_version != version or loaded != self._loaded):
            return None
        start = time.perf_counter()
        if self._root is None:
            place = roomy_folder(_sync_bytes(trainer, module.policy), "a sync (model.policy.lora.r)")
            self._root = scratch_folder("sync", place)
        folder = Path(self._root.name) / f"version-{version}"
        partial = folder.with_name(f".version-{version}")
        with writing(folder):
            module.policy.save_trained(partial)
            (partial / VERSION_FILE).write_text(str(version))
            partial.rename(folder)
        failure: Exception | None = None
        with owner.paused():
            # Ranks may share servers, whose weights must not change under the requests of another.
            trainer.strategy.barrier("sync")
            try:
                run_blocking(engine.load_weights(folder, version))
            except Exception as error:  # whatever it is, the other ranks must hear of it
                failure = error
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        # Every rank hears of it, so that none waits for one that has ended.
        num_failed = num_ranks_where(trainer, failure is not None)
        if failure is not None:
            raise failure
        if num_failed:
            raise SyncError(f"version {version} was not loaded on {num_failed} other rank(s), whose output says why")
        self._loaded = loaded
        return time.perf_counter() - start


def num_ranks_where(trainer: Trainer, holds: bool) -> int:
    """The number of ranks on which something holds. All ranks have to call it at the same time."""
    holding = torch.tensor(float(holds), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(holding, reduce_op="sum"))


def _sync_bytes(trainer: Trainer, policy: Policy) -> int:
    """The bytes that all ranks of this machine write at a sync, each its own files, and keep for an engine that restarts."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in policy.trainable_parameters())
    return 2 * trainer.num_devices * (weights + SYNC_OVERHEAD_BYTES)


def ends_phase(trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> bool:
    """Whether a micro-batch that has been trained completed the last optimizer step on its phase's rollouts."""
    num_updates = cast(SyncedModule, pl_module).loss_config.num_policy_updates
    completed_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return completed_step and trainer.global_step % num_updates == 0
