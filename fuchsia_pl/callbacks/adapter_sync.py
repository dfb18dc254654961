"""Loads the trained weights into the engine, and stops a run whose engine samples from other weights."""

import logging
import math
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.access import data_of, module_of, policy_of
from fuchsia_pl.engines.base import VERSION_FILE
from fuchsia_pl.files import roomy_folder, writing
from fuchsia_pl.loop import run_blocking
from fuchsia_pl.policy.agreement import Agreement, adapter_agreement
from fuchsia_pl.policy.contents import fingerprint
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.progress import SYNC, progress
from fuchsia_pl.scratch import scratch_folder
from fuchsia_pl.stopping import Stopped, stopping
from fuchsia_pl.types import ConfigError

GAP_METRIC = "train/logprob_gap"
MAX_PROBES = 6
MIN_STEPS_PER_LAG = 4
SYNC_OVERHEAD_BYTES = 1 << 20  # config, index and tokenizer files

logger = logging.getLogger(__name__)


class SyncError(RuntimeError):
    """The engine samples from other weights than those that are trained."""


class AdapterSync(Callback):
    """Loads the newest weights into the engine once per phase, and before any sampling starts.

    The order for step k: the engine samples batch k with version k, its micro-batches run backward, `optimizer.step` makes
    version k + 1, this callback writes and loads version k + 1, and then the data loader samples batch k + 1.

    Two checks compare engine and trainer. Before every update, the mean |policy logprob - sampling logprob| of the step's
    tokens must be within `tolerance`. On the first rollouts that were sampled with trained weights (also after a resume), a
    probe compares the effect of the adapter on the logprobs in the engine with its effect in the trainer. It finds a wrong
    scale or an adapter that was not applied long before the gap grows. The probe needs a reference, so it is skipped if all
    weights are trained with `beta: 0`.

    Args:
        tolerance: Largest mean gap in nats. On a CPU in bfloat16, rounding makes 0.03 to 0.08. If sampling runs ahead of
            training, the allowed gap is `tolerance` times (1 + steps between the batch's version and the trained one).

    Raises:
        ConfigError: The tolerance is not above 0.
    """

    def __init__(self, tolerance: float = 0.2) -> None:
        if tolerance <= 0:
            raise ConfigError(f"adapter_sync.tolerance must be above 0, got {tolerance}")
        self.tolerance = tolerance
        self.agreement: Agreement | None = None
        self._lag = 0
        self._is_before_rows = False
        self._num_candidates = 0
        self._num_probes = 0
        self._probed: Batch | None = None
        self._root: tempfile.TemporaryDirectory[str] | None = None
        self._loaded: tuple[int, tuple[int, ...]] | None = None  # version and fingerprint of the engine's weights

    def check_run(self, trainer: Trainer) -> None:
        """Checks module and data module, before the engine starts.

        Raises:
            ConfigError: The trainer has no GRPOModule or no RolloutDataModule.
        """
        module_of(trainer)
        data_of(trainer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the same check, for a trainer with a data module that does not call `check_run`."""
        self.check_run(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Syncs before step 0, or before the first step after a resume, is sampled."""
        self.sync(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Syncs the current weights, which another callback may have replaced at the start of the validation."""
        self.sync(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Syncs the trained weights again, if another callback had replaced them for the validation."""
        self.sync(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Syncs the weights of the checkpoint for `fuchsia test`."""
        self.sync(trainer, pl_module)

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Syncs the weights of the checkpoint for `fuchsia predict`."""
        self.sync(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Chooses the micro-batches to probe: the first of trained weights, and later ones while rounding hides the effect.

        Raises:
            SyncError: The weights differ from those of the last sync.
        """
        policy = policy_of(trainer)
        self._probed = None
        if batch_idx % trainer.accumulate_grad_batches == 0 and batch.step.policy_update == 0:
            self._check_content(trainer, policy)
            self._is_before_rows = True
        # With a budget of tokens, a step may begin with micro-batches without rows.
        has_first_rows = self._is_before_rows and batch.has_rows
        self._is_before_rows = self._is_before_rows and not batch.has_rows
        self._lag = trainer.global_step - batch.step.policy_update - batch.step.policy_version
        # The probe compares the sampling weights with the current ones, so the steps between must be few against all steps.
        is_comparable = batch.step.policy_version > MIN_STEPS_PER_LAG * self._lag
        if self.agreement is not None or not (has_first_rows and policy.has_reference and is_comparable):
            return
        self._num_candidates += 1
        if self._num_probes == MAX_PROBES or self._num_candidates.bit_count() > 1:
            return  # a probe may cost a forward, so only the 1st, 2nd, 4th, 8th, … of these steps are probed
        self._num_probes += 1
        self._probed = batch

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probes with the logprobs of the step, and with its reference logprobs if the step has computed them.

        Raises:
            SyncError: The adapter has another effect in the engine than in the trainer.
        """
        batch, self._probed = self._probed, None
        if batch is None:
            return
        module, mask = module_of(trainer), batch.loss_mask
        reference = module.ref_logprobs
        if reference is None:
            with trainer.precision_plugin.forward_context():  # callbacks run outside of the context of the step
                reference = policy_of(trainer).reference_logprobs(batch)
        agreement = adapter_agreement(
            module.trainer_logprobs[-1][mask],
            reference[mask],
            batch.sampling_logprobs[mask],
            lambda sums: trainer.strategy.reduce(sums, reduce_op="sum"),
        )
        if not agreement.is_conclusive:
            if self._num_probes == MAX_PROBES:
                logger.warning(
                    "%d probes found no effect of the adapter above the rounding error: it hardly learns", MAX_PROBES
                )
            return
        self.agreement = agreement
        if not agreement.holds:
            raise SyncError(
                f"the engine applies {agreement.slope:.2f} of the adapter (±{agreement.error:.2f}; 1 is correct, 0 means that it "
                f"samples from the base model) to rollouts of policy version {batch.step.policy_version}. Check that engine and "
                "trainer load the same model, and that the engine supports its sync_mode"
            )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Compares the logprob gap of the step with the tolerance.

        Raises:
            SyncError: The mean gap is above the tolerance, or not a number.
        """
        module = module_of(trainer)
        gap = float(trainer.strategy.reduce(module.step_metrics[GAP_METRIC].clone(), reduce_op="sum"))
        if not math.isfinite(gap) and module.skip_reason is not None:
            return  # FiniteGuard has reported this step
        allowed = self.tolerance * (1 + self._lag)
        if not gap <= allowed:
            raise SyncError(
                f"engine and trainer disagree at step {trainer.global_step}: the mean |policy logprob - sampling logprob| is "
                f"{gap:.3f}, and adapter_sync.tolerance allows {allowed:g}. The engine may sample from other weights "
                "(was the adapter loaded? is it the same model and dtype?) or from another distribution. This step did not "
                "update the weights. If the gap is rounding of a low precision, raise --adapter_sync.tolerance"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Syncs at the end of a phase, before the next one is sampled."""
        if stopping.is_agreed or not module_of(trainer).ends_phase(batch_idx):
            return  # a stopping run samples no further phase
        with suppress(
            Stopped
        ):  # raised on all ranks: no phase follows, and the metrics of this one must still be written
            seconds = self.sync(trainer, pl_module)
            if seconds is not None:
                pl_module.log("sync/seconds", seconds)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the folder. After a failed run, the exit of the interpreter removes it."""
        if self._root is not None:
            self._root.cleanup()
            self._root = None

    def _check_content(self, trainer: Trainer, policy: Policy) -> None:
        changed = self._loaded is None or fingerprint(policy.trainable_parameters()) != self._loaded[1]
        if num_ranks_where(trainer, changed):
            raise SyncError(
                "the trained weights were changed outside of the optimizer after the engine got those of step "
                f"{trainer.global_step}, so other weights sampled the rollouts than would be trained on them. A callback that "
                "changes weights must be before AdapterSync in the trainer's callbacks"
            )

    def sync(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        """Loads the current weights into the engine unless it has them.

        Returns:
            Seconds that the sync took, None if the engine had the weights.

        Raises:
            SyncError: The load failed on another rank.
        """
        policy, data = policy_of(trainer), data_of(trainer)
        version = trainer.global_step if trainer.state.fn == TrainerFn.FITTING else module_of(trainer).loaded_step
        engine = data.engine
        loaded = (version, fingerprint(policy.trainable_parameters()))
        if not num_ranks_where(trainer, engine.policy_version != version or loaded != self._loaded):
            return None
        start = time.perf_counter()
        if self._root is None:
            place = roomy_folder(_sync_bytes(trainer, policy), "a sync (model.policy.lora.r)")
            self._root = scratch_folder("sync", place)
        folder = Path(self._root.name) / f"version-{version}"
        partial = folder.with_name(f".version-{version}")
        with writing(folder):
            policy.save_trained(partial)
            (partial / VERSION_FILE).write_text(str(version))
            partial.rename(folder)
        failure: Exception | None = None
        with data.paused(), progress.activity(SYNC):
            # Ranks may share servers. Their weights must not change during requests of another rank.
            trainer.strategy.barrier("sync")
            try:
                run_blocking(engine.load_weights(folder, version))
            except Exception as error:  # any exception: the other ranks must be informed of it
                failure = error
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        # All ranks exchange the result, so that none waits for a rank that has ended.
        num_failed = num_ranks_where(trainer, failure is not None)
        if failure is not None:
            raise failure
        if num_failed:
            raise SyncError(f"version {version} was not loaded on {num_failed} other rank(s): see their output")
        self._loaded = loaded
        return time.perf_counter() - start


def num_ranks_where(trainer: Trainer, holds: bool) -> int:
    """Number of ranks on which a condition holds. All ranks must call it at the same time."""
    holding = torch.tensor(float(holds), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(holding, reduce_op="sum"))


def _sync_bytes(trainer: Trainer, policy: Policy) -> int:
    """Bytes that all ranks of this machine write in a sync and keep for engine restarts. Each rank writes its own files."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in policy.trainable_parameters())
    return 2 * trainer.num_devices * (weights + SYNC_OVERHEAD_BYTES)
