"""`run.json`: the step of a run while it goes, and how it ended."""

import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

import fuchsia_pl
from fuchsia_pl.callbacks.access import module_of
from fuchsia_pl.files import DiskError
from fuchsia_pl.run_record import Outcome, RunRecord, write_record
from fuchsia_pl.stopping import stopping

INTERVAL_S = 10.0
MAX_REASON_CHARS = 400

logger = logging.getLogger(__name__)


class RunState(Callback):
    """Writes the record of a run folder at its start, every ten seconds, with each checkpoint, and at its end.

    The command line makes it, because a run may end before there is a trainer. A record that cannot be written is a warning.

    Args:
        folder: The run folder.
        command: The command, such as "fit".
        max_steps: `trainer.max_steps` of a training; None without a limit.
        resumed_from: The checkpoint of `--ckpt_path`.
        is_writing: Whether this process is the first rank, which writes the record.
    """

    def __init__(
        self, folder: Path, command: str, max_steps: int | None, resumed_from: str | None, is_writing: bool
    ) -> None:
        self.folder, self.is_writing = folder, is_writing
        self.record = RunRecord(
            command,
            started_at=_now(),
            version=fuchsia_pl.__version__,
            host=socket.gethostname(),
            pid=os.getpid(),
            max_steps=max_steps,
            resumed_from=resumed_from,
        )
        self._write()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records an error or a signal that ends the `with` block."""
        try:
            yield
        except BaseException as end:
            if stopping.signum is not None:
                self.end("stopped", signal.Signals(stopping.signum).name)
            else:
                self.end("failed", _reason(end))
            raise

    def end(self, outcome: Outcome, reason: str = "") -> None:
        """Records the end. A later call changes nothing."""
        if self.record.ended_at is None:
            self.record = replace(self.record, outcome=outcome, reason=reason[:MAX_REASON_CHARS], ended_at=_now())
            self._write()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the step of a resumed run."""
        self._note(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the step, and writes it if the last write is some time ago."""
        self._note(trainer)
        if time.monotonic() - self._written_at >= INTERVAL_S:
            self._write()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the step of a checkpoint."""
        self._note(trainer)
        self._write()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the step of the policy that was evaluated."""
        is_own = Path(trainer.default_root_dir) == self.folder  # not that of the policy that `eval` compares with
        if stage != "fit" and is_own:
            self.record = replace(self.record, step=module_of(trainer).loaded_step)

    def _note(self, trainer: Trainer) -> None:
        if self.record.step != trainer.global_step:
            self.record = replace(self.record, step=trainer.global_step)

    def _write(self) -> None:
        self._written_at = time.monotonic()
        if not self.is_writing or not self.folder.is_dir():  # the folder of a run that is refused is removed
            return
        try:
            write_record(self.folder, self.record)
        except DiskError as error:  # the record is no reason to end a run, and must not hide the error that ended it
            logger.warning("%s", error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _reason(end: BaseException) -> str:
    r"""An error in one line.

    >>> _reason(ValueError("lr is -1,\n use more")), _reason(KeyError())
    ('ValueError: lr is -1, use more', 'KeyError')
    """
    shown = end.__cause__ if isinstance(end, SystemExit) and end.__cause__ is not None else end
    words = " ".join(str(shown).split())
    return f"{type(shown).__name__}: {words}" if words else type(shown).__name__
