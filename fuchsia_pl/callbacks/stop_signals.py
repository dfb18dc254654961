"""Orderly end of a run on a signal: save, close tools and engine, and print how to resume."""

import signal
import subprocess
import time
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn

from fuchsia_pl import orphans
from fuchsia_pl.callbacks.access import callbacks_of, is_trial, module_of
from fuchsia_pl.callbacks.run_checkpoint import RunCheckpoint
from fuchsia_pl.scratch import remove_left_behind
from fuchsia_pl.stopping import CLOSING_S, GRACE_S, Stopped, stopping
from fuchsia_pl.types import ConfigError


def launched_ranks(trainer: Trainer) -> list["subprocess.Popen[bytes]"]:
    """Processes of the other ranks, if this is the first rank and Lightning started them."""
    launcher = trainer.strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def await_ranks(trainer: Trainer) -> None:
    """Waits up to `CLOSING_S` for the other ranks to end: after this process they would be orphans."""
    until = time.monotonic() + CLOSING_S
    with suppress(subprocess.TimeoutExpired):
        for rank in launched_ranks(trainer):
            rank.wait(max(0.0, until - time.monotonic()))


class _NoSignals(_SignalConnector):
    """Replaces Lightning's handlers, which exchange tensors between ranks, or save, at any point of the run."""

    def register_signal_handlers(self) -> None:
        self.received_sigterm = False


class StopSignals(Callback):
    """Ends a run in order on the first SIGTERM or SIGINT, and at once on the second.

    The signal interrupts sampling, validation and the preparation before training. A step in progress is completed, with
    `mini_batches` or `num_policy_updates` its phase. Then the run saves checkpoint and adapter and closes tools and engine. All
    ranks end at the same step, whichever of them got the signal. The command exits with 143 or 130.

    Args:
        grace_s: Seconds that the step or phase in progress may take. If it takes longer, the run ends without it.
        usr1: Whether SIGUSR1 counts as SIGTERM. SLURM sends it before a time limit, with `--signal=USR1@120`.

    Raises:
        ConfigError: The grace is not above 0.
    """

    def __init__(self, grace_s: float = GRACE_S, usr1: bool = False) -> None:
        if grace_s <= 0:
            raise ConfigError(f"stop_signals.grace_s must be above 0, got {grace_s}")
        self.grace_s = grace_s
        self.usr1 = usr1
        self._has_installed = False
        self._is_within_phase = False
        self._between: dict[str, Any] | None = (
            None  # entries of a checkpoint that change between phases although nothing is trained
        )

    def check_run(self, trainer: Trainer) -> None:
        """Installs the signal handlers, before the engine starts."""
        orphans.watch()
        if trainer.is_global_zero:
            remove_left_behind()
        trainer._signal_connector = _NoSignals(trainer)
        self._has_installed = stopping.install()
        stopping.grace_s = self.grace_s
        if self.usr1:
            stopping.listen(signal.SIGUSR1, signal.SIGTERM)
        if launched_ranks(trainer):
            assert trainer.strategy.launcher is not None
            stopping.forward = trainer.strategy.launcher.kill
        self._between, self._is_within_phase = None, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on signals interrupt only waits."""
        stopping.protect()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Marks the start of a phase: a run cannot resume from a state within one."""
        self._is_within_phase = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of a phase, the ranks agree whether to continue. If not, there is no sync and no next phase."""
        if module_of(trainer).ends_phase(batch_idx):
            self._is_within_phase = False
            self._between = _between_phases(trainer)
            if stopping.agree(lambda number: _highest(trainer, number)):
                stopping.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Skips the validation of a stopping run.

        Raises:
            Stopped: The run is stopping.
        """
        if trainer.state.fn == TrainerFn.FITTING and stopping.is_agreed:
            assert stopping.signum is not None
            raise Stopped(stopping.signum)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replaces the counters in a checkpoint of a stopping run by those of the end of the last phase."""
        if stopping.signum is not None and self._between is not None:
            states = {**checkpoint["callbacks"], **self._between["callbacks"]}
            checkpoint |= {**self._between, "callbacks": states}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves, if a signal stopped the run; this hook then runs on all ranks. Notes the checkpoint to continue from."""
        try:
            stopping.close()
            if stopping.signum is not None and trainer.state.fn == TrainerFn.FITTING:
                is_agreed = trainer.world_size == 1 or (isinstance(exception, Stopped) and stopping.is_agreed)
                self._save(trainer, module_of(trainer).loaded_step, is_agreed)
            elif trainer.state.fn == TrainerFn.FITTING:
                self._note_checkpoint(trainer)
        finally:
            self._restore()  # Lightning does not call teardown after an exception

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the checkpoint for the message at the end. RunCheckpoint saves the last one after this."""
        stopping.close()
        if stopping.signum is not None:
            self._note_checkpoint(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the signal handlers, unless the command had installed them."""
        self._restore()

    def _restore(self) -> None:
        if self._has_installed:
            self._has_installed = False
            stopping.restore()

    def _save(self, trainer: Trainer, loaded_step: int, is_agreed: bool) -> None:
        checkpoint = _run_checkpoint(trainer)
        if checkpoint is None or is_trial(trainer):
            return
        can_save = self._between is not None and not self._is_within_phase and is_agreed
        if can_save and checkpoint.saved_step != trainer.global_step:
            checkpoint.save_now(trainer)
        self._note_checkpoint(trainer, loaded_step)

    def _note_checkpoint(self, trainer: Trainer, loaded_step: int = 0) -> None:
        checkpoint = _run_checkpoint(trainer)
        if checkpoint is not None and checkpoint.saved_step is not None:
            stopping.checkpoint, stopping.step = checkpoint.last_file, checkpoint.saved_step
        elif loaded_step:
            stopping.checkpoint, stopping.step = Path(str(trainer.ckpt_path)), loaded_step


def _run_checkpoint(trainer: Trainer) -> RunCheckpoint | None:
    return next(iter(callbacks_of(trainer, RunCheckpoint)), None)


def _between_phases(trainer: Trainer) -> dict[str, Any]:
    """Lightning's counters, the schedules and callbacks that monitor held-out metrics: an interrupted validation changes them."""
    watching = [*callbacks_of(trainer, EarlyStopping), *callbacks_of(trainer, Checkpoint)]
    return deepcopy(
        {
            "epoch": trainer.current_epoch,
            "loops": trainer._checkpoint_connector._get_loops_state_dict(),
            "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "callbacks": {c.state_key: c.state_dict() for c in watching if c.state_dict()},
        }
    )


def _highest(trainer: Trainer, number: int) -> int:
    held = torch.tensor(float(number), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(held, reduce_op="max"))
