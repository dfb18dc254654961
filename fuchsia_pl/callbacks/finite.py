"""Numbers that are not finite reach neither the weights nor a file."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.adapter_sync import num_ranks_where
from fuchsia_pl.callbacks.recorded_step import record_step, scaler_of, unscaled
from fuchsia_pl.files import DiskError
from fuchsia_pl.policy.contents import not_finite
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.policy.sharding import total_norm
from fuchsia_pl.types import ConfigError

NONFINITE_METRIC = "train/nonfinite"
NUM_SHOWN = 3
RECORD_FOLDER = "recorded"
NUM_KEPT = 3  # of the steps that were skipped: each may be as large as a checkpoint

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Training cannot continue with numbers that are not finite."""


class GuardedModule(Protocol):
    """What this callback knows of the module."""

    policy: Policy
    skip_reason: str | None


class FiniteGuard(Callback):
    """Skips an optimizer step whose loss or gradient norm is not finite, and stops a run whose weights are not.

    Adam keeps a NaN for ever, and clipping by the norm spreads one NaN over all gradients. So the check is made before clipping,
    over all ranks, and a step that is skipped leaves weights and optimizer as they are. After each step the weights and the
    optimizer's state are checked before anything is synced or saved, and once more whenever a checkpoint is made.
    The last three steps that were skipped are left in `recorded/` for `fuchsia replay`.

    With `trainer.precision: 16-mixed` a scaler looks for the largest factor of the loss with which no gradient is infinite, so
    now and then one is. It skips such a step itself, and where the losses are finite this callback neither counts nor records it.

    It must stand before the callbacks that write weights in the trainer's callbacks; the command puts it before all others.

    Args:
        max_nonfinite_steps: Steps in a row that are skipped; after so many the run stops. The steps of a phase train the same
            rollouts (`num_policy_updates`), so what is wrong with those skips all of them: they count as one.
        record_steps: Numbers of steps, counted from 1, that are recorded in the same way although nothing is wrong with them.

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
        self._kept: list[Path] = []  # files of steps that were skipped, oldest first
        self._losses: list[Tensor] = []  # of the step's micro-batches
        self._batches: list[Batch] = []
        self._num_in_a_row = 0
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at what was loaded.

        Raises:
            NonFiniteError: Weights or the optimizer's state are not finite.
        """
        self._losses, self._batches, self._kept = [], [], []
        self._recorded = set()
        self._num_in_a_row, self._last_step = 0, trainer.global_step
        self._check(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Keeps the step's micro-batches until it is known to be good."""
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keeps the loss of a micro-batch; reading it here would wait for the device."""
        self._losses.append(unscaled(trainer, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gives the module a reason to skip the step, on all ranks or on none.

        Raises:
            NonFiniteError: That was one phase too many.
        """
        module = cast(GuardedModule, pl_module)
        losses, self._losses = torch.stack(self._losses), []
        batches, self._batches = self._batches, []
        norm = total_norm([p.grad for p in module.policy.trainable_parameters() if p.grad is not None])
        num_ranks = num_ranks_where(trainer, not bool(losses.isfinite().all() & norm.isfinite()))
        if num_ranks and _scaler_skips(trainer, module, losses):
            num_ranks = 0
        pl_module.log(NONFINITE_METRIC, float(num_ranks > 0))
        step = trainer.global_step + 1
        file = None
        if num_ranks or step in self.record_steps:
            file = self._record(trainer, pl_module, batches, losses, norm)
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
            f"micro-batches {_shown(losses)}, gradient norm {float(norm):g}); {again}"
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
        """Looks at what an optimizer step has made, before it is synced or saved.

        Raises:
            NonFiniteError: Weights or the optimizer's state are not finite.
        """
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._check(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at what is exported last.

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
        """Whoever saves, and be it for an exception: these weights reach no file.

        Raises:
            NonFiniteError: Weights or the optimizer's state are not finite.
        """
        # Not over all ranks: after an exception, one may save while another has ended.
        names = not_finite(_tensors(trainer, pl_module))
        _refuse(trainer, names, bool(names))

    def _record(
        self, trainer: Trainer, pl_module: LightningModule, batches: list[Batch], losses: Tensor, norm: Tensor
    ) -> Path | None:
        """Leaves the step in a file of this rank; None where there is no room, which is no reason to end a run."""
        step = trainer.global_step + 1
        path = Path(trainer.default_root_dir) / RECORD_FOLDER / f"step-{step}.pt"
        self._recorded.add(step)
        try:
            return record_step(path, trainer, pl_module, batches, losses, norm)
        except DiskError as error:  # raised behind what the ranks do together, so they stay together
            logger.warning("step %d is not recorded: %s", step, error)
            return None

    def _keep(self, file: Path, step: int) -> None:
        """Bounds what a run that skips steps now and then leaves behind."""
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
    """Trained weights by name, and the tensors of the optimizers' states."""
    tensors = {name: p.detach() for name, p in pl_module.named_parameters() if p.requires_grad}
    names: dict[Tensor, str] = {
        parameter: name for name, parameter in pl_module.named_parameters() if parameter.requires_grad
    }
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            held = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            tensors |= {f"{key} of {names[parameter]}": value for key, value in held.items()}
    return tensors


def _scaler_skips(trainer: Trainer, module: GuardedModule, losses: Tensor) -> bool:
    """Whether the scaler of half precision skips a step since its factor is too large. All ranks have to call it."""
    if scaler_of(trainer) is None:
        return False
    gradients = {str(n): p.grad for n, p in enumerate(module.policy.trainable_parameters()) if p.grad is not None}
    # A norm may be infinite though no gradient is, and a scaler looks at gradients alone.
    has_overflown = num_ranks_where(trainer, bool(not_finite(gradients))) > 0
    return num_ranks_where(trainer, not bool(losses.isfinite().all())) == 0 and has_overflown


def _shown(losses: Tensor) -> str:
    return ", ".join(f"{loss:g}" for loss in losses.tolist())


def _refuse(trainer: Trainer, names: list[str], refuses: bool) -> None:
    if refuses:
        found = ", ".join(names[:NUM_SHOWN]) or "on another rank"
        more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
        raise NonFiniteError(
            f"after step {trainer.global_step} weights or the optimizer's state are not finite: {found}{more}. Nothing was saved "
            "of them: resume from an older checkpoint, with a lower learning rate"
        )
