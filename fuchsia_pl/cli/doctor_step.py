"""`fuchsia doctor --step`: one small training step of a config, as a process of its own in a folder that is removed."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fuchsia_pl.cli.diagnosis import Finding
from fuchsia_pl.cli.run_summary import summaries
from fuchsia_pl.cli.terminal import duration, figure

# Long enough for a model to say something, short enough for a CPU.
MAX_COMPLETION_TOKENS = 16
CLOSING_S = 60.0  # until the processes of a run that is told to end are killed


@dataclass(frozen=True)
class StepSize:
    """Size of the step.

    Attributes:
        num_updates: Optimizer steps of a phase: a run ends at the end of one.
        num_held_out: Held-out items that are sampled: one for each rank, or 0 if the config uses none. A schedule or a
            checkpoint may monitor a held-out metric.
        max_completion_tokens: The config's.

    >>> StepSize(num_updates=1, num_held_out=1, max_completion_tokens=32).num_updates
    1
    """

    num_updates: int
    num_held_out: int
    max_completion_tokens: int


def step_words(words: Sequence[str], root: Path, size: StepSize) -> list[str]:
    """The command line of the step.

    Args:
        words: Options of the config.
        root: Folder for the run.
        size: Its size.
    """
    return [
        *("fit", *words),
        *("--trainer.max_steps", str(size.num_updates), "--trainer.max_epochs", "-1"),
        *("--trainer.default_root_dir", str(root), "--trainer.logger", "true"),  # metrics.csv, and no service
        *("--trainer.limit_val_batches", str(size.num_held_out)),
        *("--data.sampling.max_completion_tokens", str(min(size.max_completion_tokens, MAX_COMPLETION_TOKENS))),
    ]


def trial_step(words: Sequence[str], size: StepSize, timeout_s: float) -> Sequence[Finding]:
    """Runs the step and reports its reward, or its error."""
    with tempfile.TemporaryDirectory(prefix="fuchsia-doctor-") as folder:
        root, log = Path(folder, "runs"), Path(folder, "output")
        command = [sys.executable, "-m", "fuchsia_pl", *step_words(words, root, size)]
        start = time.monotonic()
        with log.open("wb") as output:
            code = _run(command, output.fileno(), timeout_s)
        return [_finding(code, time.monotonic() - start, root, log.read_text(errors="replace"), timeout_s)]


def _run(command: Sequence[str], output: int, timeout_s: float) -> int | None:
    """The exit code, None after the time limit. The process is told to end first, so that it closes its engine."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUCHSIA_RUN")}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(CLOSING_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _finding(code: int | None, seconds: float, root: Path, output: str, timeout_s: float) -> Finding:
    if code == 0:
        runs = summaries(root) if root.is_dir() else []
        reward = f", mean reward {figure(runs[0].rewards[-1])}" if runs and runs[0].rewards else ""
        return Finding("one step", "ok", f"took {duration(seconds)} with start and end{reward}")
    if code is None:
        text = f"it did not end within {timeout_s:g} s"
        return Finding(
            "one step", "problem", text, "give more time with --step-bound, or look for a wait in the config"
        )
    errors = [line.removeprefix("error: ") for line in output.splitlines() if line.startswith("error: ")]
    rest = [line for line in output.splitlines() if line.strip()]
    text = "; ".join(errors) or (rest[-1].strip() if rest else "it printed nothing")
    return Finding(
        "one step", "problem", f"exit code {code}: {text}", "start `fuchsia fit --debug` with the same options"
    )
