"""`run.json`: the command that made a run folder, and how it ended. Reports and lists of runs read it."""

import json
import socket
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Literal

import psutil

from fuchsia_pl.files import replacing

RECORD_FILE = "run.json"
CLOCK_SLACK_S = 60.0  # the clock may have been set back a little since the process began

Outcome = Literal["running", "finished", "stopped", "failed", "killed"]


@dataclass(frozen=True)
class RunRecord:
    """Facts of the run of a folder.

    Attributes:
        command: The command, such as "fit".
        started_at: Start in UTC, ISO 8601.
        version: Version of Fuchsia-PL.
        host: Name of the machine of the first rank.
        pid: Process id of the first rank.
        ended_at: End in UTC, ISO 8601; None while it runs, and if it was killed.
        outcome: "running" until the process ends by itself. "stopped" is after a signal, "failed" after an error.
        reason: The line of the error or the signal; "" otherwise.
        step: Optimizer steps of the run, including those before a resume.
        max_steps: `trainer.max_steps`; None without a limit.
        resumed_from: The checkpoint of `--ckpt_path`; None without one.

    >>> RunRecord("fit", "2026-01-02T03:04:05+00:00", "0.1.0", "node1", pid=12).outcome
    'running'
    """

    command: str
    started_at: str
    version: str
    host: str
    pid: int
    ended_at: str | None = None
    outcome: Outcome = "running"
    reason: str = ""
    step: int = 0
    max_steps: int | None = None
    resumed_from: str | None = None

    @property
    def current_outcome(self) -> Outcome:
        """The outcome, "killed" for a run of this machine whose process is gone without having recorded its end."""
        is_local = self.outcome == "running" and is_of_this_machine(self.host)
        if is_local and not _is_alive(self.pid, self.started_at):
            return "killed"
        return self.outcome


def write_record(folder: Path, record: RunRecord) -> None:
    """Writes the record of a run folder, atomically.

    Raises:
        DiskError: It could not be written. An older record is unchanged.
    """
    with replacing(folder / RECORD_FILE) as partial:
        partial.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> RunRecord | None:
    """The record of a run folder; None if the folder has none that can be read."""
    try:
        loaded = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        names = {field.name for field in fields(RunRecord)}
        return RunRecord(**{name: value for name, value in loaded.items() if name in names})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def is_of_this_machine(host: str) -> bool:
    """Whether a record's host is this machine, so that its process can be looked up."""
    return host == socket.gethostname()


def _is_alive(pid: int, started_at: str) -> bool:
    """Whether the process of a record exists. One that began after the record is another with the same number."""
    try:
        began = psutil.Process(pid).create_time()
        return began <= datetime.fromisoformat(started_at).timestamp() + CLOCK_SLACK_S
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, ValueError, TypeError):  # without the right to look, or a foreign time
        return True
