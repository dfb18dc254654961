"""Console output of a run: its settings, a table with a row per optimizer step, completions, and a summary."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.trainer.states import TrainerFn
from rich.text import Text

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.access import callbacks_of, data_of
from fuchsia_pl.callbacks.console_progress import Pace, ProgressDisplay, RunConsole
from fuchsia_pl.callbacks.console_settings import run_table
from fuchsia_pl.callbacks.console_summary import (
    Finished,
    evaluation_line,
    figure_lines,
    place_lines,
    plain_figures,
    summary_lines,
)
from fuchsia_pl.callbacks.console_table import Column, header_row, shown_columns, step_row
from fuchsia_pl.callbacks.console_text import completion_panel, visible
from fuchsia_pl.evaluation.held_out import HeldOut, read_held_out
from fuchsia_pl.progress import TRAINING, Activity, progress
from fuchsia_pl.samples import Sample
from fuchsia_pl.stopping import Stopped
from fuchsia_pl.types import ConfigError


class ConsoleReport(ProgressBar):
    """Prints the settings of a run, a row per optimizer step, a completion every few steps, and a summary.

    On a terminal, the last line shows what the run does: rollouts and micro-batches of the step, held-out items, the start of
    the engine.

    Args:
        every_n_steps: Optimizer steps between two shown completions; 0 shows none.

    Raises:
        ConfigError: `every_n_steps` is below 0.
    """

    def __init__(self, every_n_steps: int = 5) -> None:
        super().__init__()
        if every_n_steps < 0:
            raise ConfigError(f"console.every_n_steps must be 0 or more, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.console = RunConsole(highlight=False)
        self.lists_figures = (
            True  # of an evaluation outside of a training; False where the command prints a table of them
        )
        self._display: ProgressDisplay | None = None
        self._columns: tuple[Column, ...] = ()  # of the header that the next row belongs to
        self._last_step = self._first_step = self._num_tokens = 0
        self._start = 0.0
        self._ends_at: float | None = None  # by `trainer.max_time`
        self._samples: list[Sample] = []
        self._step = ExitStack()  # the step in progress
        self._training: Activity | None = None

    def disable(self) -> None:
        """Turns the output off. Lightning calls this on all ranks but the first."""
        self.console.quiet = True

    def enable(self) -> None:
        """Turns the output on again."""
        self.console.quiet = False

    def announce(self, model: str, engine: str, run_folder: str) -> None:
        """Prints the engine, model and run folder before the engine starts, which may take minutes."""
        self._print(f"run folder: {run_folder}")
        self._print(f"starting {engine} with {model} …")

    def check_run(self, trainer: Trainer) -> None:
        """Shows work in progress from here on, before the prompts are rendered and the engine starts."""
        if not trainer.is_global_zero:
            self.disable()
        self._begin(trainer.global_step)
        self._opened.open()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table of settings."""
        self._begin(trainer.global_step)
        limits = [timer.time_remaining() for timer in callbacks_of(trainer, Timer)]
        remaining = min((limit for limit in limits if limit is not None), default=None)
        self._ends_at = None if remaining is None else self._start + remaining
        self.console.print(run_table(trainer))
        total = trainer.estimated_stepping_batches
        steps = int(total) if 0 < total < float("inf") else None
        self._opened.begin_training(Pace(trainer.global_step, steps, self._start))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Starts the bar of a step's micro-batches. Those without rows come first and are not shown."""
        if self._training is None and batch.has_rows:
            total = trainer.accumulate_grad_batches
            work = progress.activity(TRAINING, total - batch_idx % total, "micro-batches")
            self._training = self._step.enter_context(work)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Prints a row if this micro-batch completed an optimizer step."""
        if self._training is not None:
            self._training.advance()
        self._samples += batch.samples
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._samples += batch.step.zero_advantage
        if trainer.global_step == self._last_step:
            return
        self._end_step()
        self._last_step = step = trainer.global_step
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._num_tokens += _sampled_tokens(trainer, metrics) if batch.step.phase_step == 0 else 0
        self._print_row(step, metrics)
        if self.every_n_steps and step % self.every_n_steps == 0 and self._samples:
            self.console.print(completion_panel(self._samples[step % len(self._samples)]))
            self._columns = ()
        self._samples = []

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the held-out figures before training."""
        number = trainer.num_sanity_val_steps
        when = "before training" if number == float("inf") else f"before training, first {number} items"
        self._print_evaluation(trainer, when, 0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the held-out figures."""
        if not trainer.sanity_checking:
            step = data_of(trainer).engine.policy_version
            self._print_evaluation(trainer, f"after step {step}", step)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the held-out figures."""
        self._print_evaluation(trainer, "test", data_of(trainer).engine.policy_version)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the summary, after all other callbacks have written their files."""
        self._opened.end_training()
        folder = Path(trainer.default_root_dir)
        finished = self._finished(trainer, tuple(_evaluations(folder, "validation")))
        for line in summary_lines(finished):
            self._print(line)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Prints how far the run came. What to do is printed with the error."""
        is_training = self._opened.pace is not None
        self._end_step()
        self._opened.end_training()
        if is_training:
            end = "stopped" if isinstance(exception, Stopped | KeyboardInterrupt) else "failed"
            self._print(f"{end}: {self._finished(trainer).text}")
            for line in place_lines(Path(trainer.default_root_dir)):
                self._print(line)
        self._opened.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Shows no more work in progress."""
        self._end_step()
        self._opened.close()

    @property
    def _opened(self) -> ProgressDisplay:
        """The display of work in progress on the current console."""
        if self._display is None or self._display.console is not self.console:
            self._display = ProgressDisplay(self.console)
        return self._display

    def _begin(self, step: int) -> None:
        """Sets the state of a run that starts at a step."""
        self._last_step = self._first_step = step
        self._num_tokens, self._columns, self._samples, self._start = 0, (), [], time.monotonic()

    def _end_step(self) -> None:
        self._training = None
        self._step.close()

    def _finished(self, trainer: Trainer, evaluations: tuple[HeldOut, ...] = ()) -> Finished:
        seconds = time.monotonic() - self._start
        folder = Path(trainer.default_root_dir)
        return Finished(folder, self._last_step, self._first_step, seconds, self._num_tokens, evaluations)

    def _print(self, line: str) -> None:
        # Text, since a string is read as markup. A path may contain brackets.
        self.console.print(Text(visible(line)), soft_wrap=True)
        self._opened.wrote()

    def _print_row(self, step: int, metrics: dict[str, float]) -> None:
        """Prints the row of a step, after the titles if other output or another column has separated it from them."""
        now, pace = time.monotonic(), self._opened.pace
        columns = shown_columns(metrics, self.console.width)
        if columns != self._columns:
            self._columns = columns
            self.console.print(Text(header_row(columns), style="bold"), soft_wrap=True)
        left = None
        if pace is not None:
            pace.stepped(step, now)
            left = pace.left(now)
        if self._ends_at is not None:
            left = min(max(self._ends_at - now, 0.0), left if left is not None else float("inf"))
        self._print(step_row(step, columns, metrics, left))

    def _print_evaluation(self, trainer: Trainer, when: str, step: int) -> None:
        split = "test" if trainer.state.fn == TrainerFn.TESTING else "validation"
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        folder = Path(trainer.default_root_dir)
        logged = plain_figures(metrics, split)
        found = [one for one in _evaluations(folder, split) if one.step == step]
        # One evaluation has the logged figures with their intervals. Several are those of several environments.
        named = {f"{when}, {one.environment}": one.figures for one in found}
        evaluations = named if len(found) > 1 else {when: logged | (found[0].figures if found else {})}
        for name, figures in evaluations.items():
            self._print(evaluation_line(name, figures, self.console.width))
        if trainer.state.fn != TrainerFn.FITTING and self.lists_figures:
            for line in [*figure_lines(logged | evaluations.get(when, {})), *place_lines(folder)]:
                self._print(line)


def _evaluations(folder: Path, split: str) -> list[HeldOut]:
    return [one for one in read_held_out(folder) if one.split == split]


def _sampled_tokens(trainer: Trainer, metrics: dict[str, float]) -> int:
    """Tokens that were sampled for a phase: its mean length times its rollouts, with those of replaced groups."""
    data = data_of(trainer)
    num_refilled = metrics.get("rollout/refilled_groups", 0.0)
    num_rollouts = data.rows_per_phase + num_refilled * data.sampling.group_size
    length = metrics.get("rollout/completion_tokens", 0.0)
    return round(length * num_rollouts) if length == length else 0
