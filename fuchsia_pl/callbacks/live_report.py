"""`report.html`, rewritten while a run goes on."""

import logging
import os
import signal
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

import fuchsia_pl
from fuchsia_pl.callbacks.access import is_trial, module_of
from fuchsia_pl.report.metrics import HELD_OUT_SPLITS, METRICS_FILE
from fuchsia_pl.report.run_data import MAX_ROLLOUTS, REPORT_FILE, RolloutReader, run_summary, write_report
from fuchsia_pl.run_record import Outcome, RunRecord, read_record
from fuchsia_pl.stopping import stopping
from fuchsia_pl.types import ConfigError

HELD_OUT_PREFIXES = tuple(f"{split}/" for split in HELD_OUT_SPLITS)
MAX_SHARE = 0.02  # of the time of a run; a large report is written less often than every_s
COMMANDS = {TrainerFn.FITTING: "fit", TrainerFn.VALIDATING: "validate", TrainerFn.TESTING: "test"}

logger = logging.getLogger(__name__)


class LiveReport(Callback):
    """Writes `report.html` to the run folder: after a step, after each validation, and at the end of the run.

    The first rank writes it, from the files of the run. A report that cannot be written is a warning and does not end the run.

    Args:
        enabled: Whether the report is written.
        every_s: Seconds between two reports of a running training; 0 writes them after validations and at the end only. Writing
            takes at most 2 % of the time, so a large report is written less often.
        max_rollouts: Largest number of rollouts in the report. Beyond it, whole groups are left out by a fixed choice.

    Raises:
        ConfigError: A number is below 0.
    """

    def __init__(self, enabled: bool = True, every_s: float = 10.0, max_rollouts: int = MAX_ROLLOUTS) -> None:
        if not every_s >= 0:
            raise ConfigError(f"report.every_s must be 0 or more, got {every_s}")
        if max_rollouts < 0:
            raise ConfigError(f"report.max_rollouts must be 0 or more, got {max_rollouts}")
        self.enabled = enabled
        self.every_s = every_s
        self.max_rollouts = max_rollouts
        self._reader: RolloutReader | None = None
        self._record: RunRecord | None = None
        self._rows: list[dict[str, Any]] = []  # metrics of this run's steps, for a run without metrics.csv
        self._last_step = 0
        self._next_time = 0.0
        self._has_begun = False
        self._has_warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts a new report. The facts are those of `run.json`, if the command line has written it."""
        folder = Path(trainer.default_root_dir)
        self._reader, self._rows, self._has_warned = RolloutReader(folder, self.max_rollouts), [], False
        self._record = _record(trainer, folder)
        self._next_time, self._has_begun = 0.0, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the step of a resumed run."""
        self._last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From now on a failure has a report. The folder of a run that was refused before this is removed."""
        self._has_begun = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes a report after an optimizer step if it is time for one."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}  # may be reduced over ranks
        if self._reader is not None and (self._reader.folder / METRICS_FILE).is_file():
            self._rows = []  # Lightning logs this step after this hook, and has logged all others
        own = {name: value for name, value in metrics.items() if not name.startswith(HELD_OUT_PREFIXES)}
        self._rows.append({**own, "step": trainer.global_step - 1})
        if self.every_s and time.monotonic() >= self._next_time:
            self._write(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on a failure has a report."""
        self._has_begun = True

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes a report with the held-out figures."""
        self._write(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the last report, which states the end of the run."""
        self._end(trainer, "finished", "")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the last report of a run that fails. Lightning calls no `teardown` then."""
        if stopping.signum is not None:
            self._end(trainer, "stopped", signal.Signals(stopping.signum).name)
        else:
            self._end(trainer, "failed", f"{type(exception).__name__}: {' '.join(str(exception).split())}")

    def _end(self, trainer: Trainer, outcome: Outcome, reason: str) -> None:
        if self._record is None or not self._has_begun:
            return
        step = trainer.global_step if self._record.command == "fit" else module_of(trainer).loaded_step
        self._record = replace(self._record, outcome=outcome, reason=reason, ended_at=_now(), step=step)
        self._write(trainer)
        self._reader, self._record = None, None

    def _write(self, trainer: Trainer) -> None:
        if not self.enabled or not trainer.is_global_zero or is_trial(trainer) or self._reader is None:
            return
        started = time.monotonic()
        try:
            self._reader.read()
            summary = run_summary(self._reader.folder, self._record, self._rows)
            write_report(self._reader.folder / REPORT_FILE, self._reader, [summary])
        except Exception as error:  # a full disk or an odd file is no reason to end a run
            if not self._has_warned:
                logger.warning("the report is not written: %s: %s", type(error).__name__, error)
            self._has_warned = True
        ended = time.monotonic()
        self._next_time = ended + max(self.every_s, (ended - started) / MAX_SHARE)


def _record(trainer: Trainer, folder: Path) -> RunRecord:
    """Facts of a run that is going on: those of its `run.json`, or of this process for a run without one."""
    recorded = read_record(folder)
    if recorded is not None and recorded.outcome == "running" and recorded.pid == os.getpid():
        return recorded
    assert trainer.state.fn is not None
    return RunRecord(
        COMMANDS.get(trainer.state.fn, str(trainer.state.fn.value)),
        started_at=_now(),
        version=fuchsia_pl.__version__,
        host=socket.gethostname(),
        pid=os.getpid(),
        step=trainer.global_step,
        max_steps=trainer.max_steps if trainer.max_steps > 0 else None,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
