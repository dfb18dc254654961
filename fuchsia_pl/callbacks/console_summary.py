"""Held-out figures, and the summary at the end of a run."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuchsia_pl.callbacks.adapter_export import ADAPTER_FOLDER
from fuchsia_pl.callbacks.console_table import clock
from fuchsia_pl.callbacks.run_metrics import METRICS_FILE
from fuchsia_pl.evaluation.figures import Figure
from fuchsia_pl.evaluation.held_out import HeldOut

ACCURACY, REWARD = "rollout/accuracy", "reward/mean"
# Figures in the line of an evaluation, in order: name, label, decimal places. pass@k and maj@k follow the first two.
SHOWN = (
    (ACCURACY, "accuracy", 3),
    (REWARD, "reward", 3),
    ("rollout/truncated_fraction", "cut off", 2),
    ("rollout/completion_tokens", "length", 1),
)
# What a run folder may contain, and for whom.
PLACES = (
    ("adapter", ADAPTER_FOLDER),
    ("report", "report.html"),
    ("rollouts", "rollouts.jsonl"),
    ("held out", "rollouts-validation.jsonl"),
    ("held out", "rollouts-test.jsonl"),
    ("metrics", METRICS_FILE),
    ("warnings", "warnings.jsonl"),
    ("log", "run.log"),
)
SAVED_CONFIG = "config.yaml"  # only runs of the command have it, and its other commands read it


@dataclass(frozen=True)
class Finished:
    """Facts of a training that has ended.

    Attributes:
        folder: The run folder.
        step: Optimizer steps of the run.
        first_step: Optimizer steps of the run that it resumed; 0 for a new one.
        seconds: Duration of the training.
        num_tokens: Tokens that were sampled for training, over all ranks.
        evaluations: Held-out evaluations, oldest first.

    >>> Finished(Path("runs/a/0"), step=25, first_step=0, seconds=292.0, num_tokens=38400).evaluations
    ()
    """

    folder: Path
    step: int
    first_step: int
    seconds: float
    num_tokens: int
    evaluations: Sequence[HeldOut] = ()

    @property
    def text(self) -> str:
        """Steps, time and tokens.

        >>> Finished(Path("runs/a/0"), step=25, first_step=10, seconds=292.0, num_tokens=38400).text
        '15 steps (11 to 25) in 4:52, 38,400 tokens sampled'
        """
        number = self.step - self.first_step
        which = f" ({self.first_step + 1} to {self.step})" if self.first_step and number else ""
        return f"{number} steps{which} in {clock(self.seconds)}, {self.num_tokens:,} tokens sampled"


def plain_figures(metrics: Mapping[str, float], split: str) -> dict[str, Figure]:
    """Figures without intervals, from logged metrics.

    Args:
        metrics: Values by name.
        split: "validation" or "test", the prefix of the names.
    """
    prefix = f"{split}/"
    values = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {name: Figure(value, math.nan, math.nan) for name, value in values.items()}


def figure_text(figure: Figure, decimals: int = 3) -> str:
    """A figure with its interval, if it has one.

    >>> figure_text(Figure(0.65625, 0.53, 0.77)), figure_text(Figure(0.5, math.nan, math.nan))
    ('0.656 [0.530, 0.770]', '0.500')
    """
    value = f"{figure.value:.{decimals}f}"
    return f"{value} [{figure.low:.{decimals}f}, {figure.high:.{decimals}f}]" if has_interval(figure) else value


def has_interval(figure: Figure) -> bool:
    """Whether a figure has an interval; a logged metric has none."""
    return math.isfinite(figure.low) and math.isfinite(figure.high)


def evaluation_line(when: str, figures: Mapping[str, Figure], width: int) -> str:
    """The most important held-out figures in one line.

    Args:
        when: Point of the run, such as "after step 25".
        figures: Figures by name.
        width: Width of the console. Figures that do not fit are left out; intervals have the room that is left, the first
            figure has its own in any case.

    >>> evaluation_line("before training", {"rollout/accuracy": Figure(0.15625, 0.078, 0.25)}, 80)
    'held out, before training: accuracy 0.156 [0.08, 0.25]'
    """
    shown = [one for one in (*SHOWN[:2], *_of_largest_k(figures), *SHOWN[2:]) if one[0] in figures]
    short = [f"{label} {figures[name].value:.{decimals}f}" for name, label, decimals in shown]
    full = [f"{text}{_interval(figures[name])}" for text, (name, *_) in zip(short, shown, strict=True)]

    def line(texts: Sequence[str]) -> str:
        return f"held out, {when}: {', '.join(texts)}"

    texts = full[:1]
    for text in short[1:]:
        if len(line([*texts, text])) > width:
            break
        texts.append(text)
    for place in range(1, len(texts)):
        longer = [*texts[:place], full[place], *texts[place + 1 :]]
        texts = longer if len(line(longer)) <= width else texts
    return line(texts)


def _interval(figure: Figure) -> str:
    return f" [{figure.low:.2f}, {figure.high:.2f}]" if has_interval(figure) else ""


def _of_largest_k(figures: Mapping[str, Figure]) -> list[tuple[str, str, int]]:
    """The figures pass@k and maj@k of the largest k, as in `SHOWN`."""
    found = {}
    for kind in ("pass@", "maj@"):
        numbers = [int(name.removeprefix(kind)) for name in figures if name.startswith(kind)]
        if numbers:
            found[kind] = max(numbers)
    return [(f"{kind}{number}", f"{kind}{number}", 3) for kind, number in found.items()]


def figure_lines(figures: Mapping[str, Figure]) -> list[str]:
    """All figures, one in each line.

    >>> figure_lines({"reward/mean": Figure(0.5, 0.4, 0.6), "pass@1": Figure(0.25, 0.2, 0.3)})
    ['  pass@1       0.250 [0.200, 0.300]', '  reward/mean  0.500 [0.400, 0.600]']
    """
    longest = max(map(len, figures), default=0)
    return [f"  {name:<{longest}}  {figure_text(figure)}" for name, figure in sorted(figures.items())]


def change_lines(evaluations: Sequence[HeldOut]) -> list[str]:
    """Held-out figures before and after a training, each with its interval; for each environment."""
    names = list(dict.fromkeys(one.environment for one in evaluations))
    lines = []
    for environment in names:
        lines += _changes([one for one in evaluations if one.environment == environment], len(names) > 1)
    return lines


def _changes(evaluations: Sequence[HeldOut], is_one_of_many: bool) -> list[str]:
    """Figures of the first and of the last of some evaluations of one environment."""
    first, last = evaluations[0], evaluations[-1]
    has_before = first.step < last.step
    lines = []
    for name, label in ((ACCURACY, "accuracy"), (REWARD, "reward")):
        if name in last.figures:
            before = f"{figure_text(first.figures[name])} -> " if has_before and name in first.figures else ""
            lines.append(f"  {label:<8}  {before}{figure_text(last.figures[name])}{_best(evaluations, name)}")
    if not lines:
        return []
    steps = f"step {first.step} -> {last.step}" if has_before else f"step {last.step}"
    whose = f" of {last.environment}" if is_one_of_many else ""
    shared = f", {last.num_shared} of them with the prompt of a training item" if last.num_shared else ""
    return [f"held out{whose}, {steps}, {last.num_items} items{shared}:", *lines]


def _best(evaluations: Sequence[HeldOut], name: str) -> str:
    """The best value and its step, if the last one is below it."""
    value, step = max(
        ((one.figures[name].value, one.step) for one in evaluations if name in one.figures), key=lambda pair: pair[0]
    )
    return f" (best {value:.3f}, step {step})" if value > evaluations[-1].figures[name].value else ""


def place_lines(folder: Path) -> list[str]:
    """The files of a run folder that exist."""
    return [f"  {label:<8}  {folder / name}" for label, name in PLACES if (folder / name).exists()]


def next_lines(folder: Path) -> list[str]:
    """The commands that use a run."""
    if not (folder / SAVED_CONFIG).exists():
        return []
    run = shlex.quote(str(folder))
    return ["next:", f"  fuchsia report {run}", f"  fuchsia eval --run {run} --against base", f"  fuchsia chat {run}"]


def summary_lines(finished: Finished) -> list[str]:
    """The last lines of a run."""
    folder = finished.folder
    return [
        f"done: {finished.text}",
        *change_lines(finished.evaluations),
        *place_lines(folder),
        *next_lines(folder),
    ]
