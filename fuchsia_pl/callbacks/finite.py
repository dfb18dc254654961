"""Keeps numbers that are not finite out of weights and files."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.access import module_of, policy_of
from fuchsia_pl.callbacks.adapter_sync import num_ranks_where
from fuchsia_pl.callbacks.recorded_step import record_step, scaler_of, unscaled
from fuchsia_pl.files import DiskError
from fuchsia_pl.policy.contents import not_finite
from fuchsia_pl.policy.sharding import total_norm
from fuchsia_pl.types import ConfigError

NONFINITE_METRIC = "train/nonfinite"
NUM_SHOWN = 3
RECORD_FOLDER = "recorded"
NUM_KEPT = 3  # recorded skipped steps: each may be as large as a checkpoint

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Training cannot continue with numbers that are not finite."""


class FiniteGuard(Callback):
    """Skips an optimizer step whose loss or gradient norm is not finite, and stops a run whose weights are not.

    Adam's moments never lose a NaN, and clipping by the norm spreads one NaN over all gradients. So the check runs before
    clipping, over all ranks, and a skipped step changes neither weights nor optimizer state. After each step, the callback
    checks weights and optimizer state before they are synced or saved, and again for each checkpoint. The last three skipped
    steps are recorded in `recorded/` for `fuchsia replay`.

    With `trainer.precision: 16-mixed`, a scaler searches for the largest loss factor without infinite gradients, so some steps
    overflow. The scaler skips them itself. If their losses are finite, this callback neither counts nor records them.

    The callback must be before those that write weights in the trainer's callbacks; the command puts it first.

    Args:
        max_nonfinite_steps: Number of skipped steps in a row that stops the run. The steps of a phase train the same rollouts
            (`num_policy_updates`), so one bad rollout skips all of them: they count as one.
        record_steps: Numbers of steps, counted from 1, that are recorded in the same way although they are finite.

    Raises:
        ConfigError: A number is below 1.
    """

    def __init__(self, max_nonfinite_steps: int = 3, record_steps: tuple[int, ...] = ()) -> None:
        if max_nonfinite_steps < 1:
            raise ConfigError(f"finite_guard.max_nonfinite_steps must be 1 or more, got {max_nonfinite_steps}")
        if any(step < 1 for step in record_steps):
            raise ConfigError(
                f"finite_guard.record_steps must be numbers of steps, counted from 1, got {list(record_steps)}"
            )
        self.max_nonfinite_steps = max_nonfinite_steps
        self.record_steps = record_steps
        self._recorded: set[int] = set()
        self._kept: list[Path] = []  # files of skipped steps, oldest first
        self._losses: list[Tensor] = []  # one per micro-batch of the step
        self._batches: list[Batch] = []
        self._num_in_a_row = 0
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the weights and the optimizer state that were loaded.

        Raises:
            NonFiniteError: Weights or the optimizer's state are not finite.
        """
        self._losses, self._batches, self._kept = [], [], []
        self._recorded = set()
        self._num_in_a_row, self._last_step = 0, trainer.global_step
        self._check(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Keeps the micro-batches of a step until its gradients are checked."""
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keeps the loss of a micro-batch. Reading its value here would wait for the device."""
        self._losses.append(unscaled(trainer, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Sets the module's reason to skip the step, on all ranks or on none.

        Raises:
            NonFiniteError: `max_nonfinite_steps` is reached.
        """
        module, trained = module_of(trainer), policy_of(trainer).trainable_parameters()
        losses, self._losses = torch.stack(self._losses), []
        batches, self._batches = self._batches, []
        norm = total_norm([p.grad for p in trained if p.grad is not None])
        num_ranks = num_ranks_where(trainer, not bool(losses.isfinite().all() & norm.isfinite()))
        if num_ranks and _scaler_skips(trainer, losses):
            num_ranks = 0
        pl_module.log(NONFINITE_METRIC, float(num_ranks > 0))
        step = trainer.global_step + 1
        file = None
        if num_ranks or step in self.record_steps:
            file = self._record(trainer, batches, losses, norm)
        if not num_ranks:
            self._num_in_a_row = 0
            return
        if self._num_in_a_row == 0 or batches[0].step.policy_update == 0:
            self._num_in_a_row += 1
        again = "it could not be recorded"
        if file is not None:
            self._keep(file, step)
            again = f"`fuchsia replay {file}` computes it again"
        found = (
            f"the loss or the gradient is not finite on {num_ranks} of {trainer.world_size} ranks (here: losses of the "
            f"micro-batches {_shown(batches, losses)}, gradient norm {float(norm):g}); {again}"
        )
        if self._num_in_a_row >= self.max_nonfinite_steps:
            raise NonFiniteError(
                f"step {step}: {found}. It is phase {self._num_in_a_row} of this kind in a row, and "
                f"finite_guard.max_nonfinite_steps is {self.max_nonfinite_steps}. The weights are those of the last good step. "
                "Lower the learning rate or the rewards, or set trainer.precision to 32-true"
            )
        module.skip_reason = found

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Checks the result of an optimizer step before it is synced or saved.

        Raises:
            NonFiniteError: Weights or the optimizer's state are not finite.
        """
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._check(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the weights before the last export.

        Raises:
            NonFiniteError: Weights or the optimizer's state are not finite.
        """
        self._check(trainer, pl_module)
        missed = sorted(set(self.record_steps) - self._recorded)
        if missed:
            logger.warning(
                "finite_guard.record_steps: %s are no steps of this run, so none of them was recorded", missed
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Checks the weights of every checkpoint, including one that is saved because of an exception.

        Raises:
            NonFiniteError: Weights or the optimizer's state are not finite.
        """
        # On this rank alone: after an exception, another rank may have ended.
        names = not_finite(_tensors(trainer, pl_module))
        _refuse(trainer, names, bool(names))

    def _record(self, trainer: Trainer, batches: list[Batch], losses: Tensor, norm: Tensor) -> Path | None:
        """Records the step in a file of this rank. Returns None if the disk is full, which does not end the run."""
        step = trainer.global_step + 1
        path = Path(trainer.default_root_dir) / RECORD_FOLDER / f"step-{step}.pt"
        self._recorded.add(step)
        try:
            return record_step(path, trainer, batches, losses, norm)
        except DiskError as error:  # raised after the exchanges between ranks, so the ranks stay in step
            logger.warning("step %d is not recorded: %s", step, error)
            return None

    def _keep(self, file: Path, step: int) -> None:
        """Removes the oldest records of skipped steps, so that at most `NUM_KEPT` stay."""
        if step in self.record_steps:
            return
        self._kept.append(file)
        for older in self._kept[:-NUM_KEPT]:
            older.unlink(missing_ok=True)
        self._kept = self._kept[-NUM_KEPT:]

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = not_finite(_tensors(trainer, pl_module))
        _refuse(trainer, names, num_ranks_where(trainer, bool(names)) > 0)


def _tensors(trainer: Trainer, pl_module: LightningModule) -> Mapping[str, Tensor]:
    """Trained weights by name, and the tensors of the optimizer states."""
    tensors = {name: p.detach() for name, p in pl_module.named_parameters() if p.requires_grad}
    names: dict[Tensor, str] = {
        parameter: name for name, parameter in pl_module.named_parameters() if parameter.requires_grad
    }
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            held = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            tensors |= {f"{key} of {names[parameter]}": value for key, value in held.items()}
    return tensors


def _scaler_skips(trainer: Trainer, losses: Tensor) -> bool:
    """Whether the scaler of half precision skips a step because its factor is too large. All ranks must call it."""
    if scaler_of(trainer) is None:
        return False
    gradients = {str(n): p.grad for n, p in enumerate(policy_of(trainer).trainable_parameters()) if p.grad is not None}
    # The norm may overflow although all gradients are finite, and the scaler checks only gradients.
    has_overflown = num_ranks_where(trainer, bool(not_finite(gradients))) > 0
    return num_ranks_where(trainer, not bool(losses.isfinite().all())) == 0 and has_overflown


def _shown(batches: list[Batch], losses: Tensor) -> str:
    each = zip(batches, losses.tolist(), strict=True)
    return ", ".join(f"{loss:g}" for batch, loss in each if batch.has_rows)


def _refuse(trainer: Trainer, names: list[str], refuses: bool) -> None:
    if refuses:
        found = ", ".join(names[:NUM_SHOWN]) or "on another rank"
        more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
        raise NonFiniteError(
            f"after step {trainer.global_step} weights or the optimizer's state are not finite: {found}{more}. They were not "
            "saved: resume from an older checkpoint, with a lower learning rate"
        )
