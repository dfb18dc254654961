"""`fuchsia runs`: lists the runs under a root, and compares two of them. Loads no torch."""

import fnmatch
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fuchsia_pl.cli.find_run import find_run
from fuchsia_pl.cli.options import runs_diff_options, runs_options
from fuchsia_pl.cli.run_diff import compared, print_difference
from fuchsia_pl.cli.run_summary import NO_RUN, RunSummary, is_training, summaries
from fuchsia_pl.cli.terminal import duration, figure, local_time, plain, size
from fuchsia_pl.run_record import is_of_this_machine
from fuchsia_pl.types import ConfigError

DIFF = "diff"
WIDE = 110  # columns of a terminal that also shows kinds, intervals and years
NUM_REASONS = 5
COLORS = {"finished": "green", "running": "cyan", "failed": "red", "killed": "red", "stopped": "yellow"}


def runs(arguments: list[str]) -> int:
    """Runs `fuchsia runs`; returns the exit code."""
    try:
        if arguments[:1] == [DIFF]:
            return _diff(arguments[1:])
        return _list(arguments)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _diff(arguments: list[str]) -> int:
    given = runs_diff_options().parse_args(arguments)
    difference = compared(find_run(given.a, given.root), find_run(given.b, given.root), Path(given.root))
    if given.json:
        _write_json(asdict(difference))
    else:
        print_difference(Console(highlight=False), difference)
    return 0


def _list(arguments: list[str]) -> int:
    given = runs_options().parse_args(arguments)
    root = Path(given.root)
    if not root.is_dir():
        raise ConfigError(
            f"there is no folder {root}: give the root of the runs, trainer.default_root_dir (the default is ./runs)"
        )
    if given.limit is not None and given.limit < 1:
        raise ConfigError(f"--limit must be 1 or more, got {given.limit}")
    everything = summaries(root)
    wanted = [run for run in everything if _is_wanted(run, given.name, given.ended)]
    shown = wanted if given.all else [run for run in wanted if is_training(run) or run.outcome == NO_RUN]
    num_hidden = len(wanted) - len(shown)
    listed = shown[: given.limit]
    if given.json:
        _write_json([as_json(run) for run in listed])
        return 0
    console = Console(highlight=False)
    if listed:
        console.print(table_of(listed, console.width))
        console.print()
    for line in _notes(listed, root, num_hidden, num_cut=len(shown) - len(listed), is_empty=not everything):
        console.print(Text(line), soft_wrap=True)
    return 0


def as_json(run: RunSummary) -> dict[str, Any]:
    """The entry of `--json`."""
    best = run.best
    return {
        "run": run.name,
        "folder": str(run.folder),
        "kind": run.kind or None,
        "config": run.config,
        "step": run.step,
        "max_steps": run.max_steps,
        "best_held_out": None if best is None else asdict(best),
        "last_reward": run.rewards[-1] if run.rewards else None,
        "started_at": None if run.started_at is None else run.started_at.isoformat(),
        "duration_s": run.duration_s,
        "size_bytes": run.size_bytes,
        "outcome": run.outcome,
        "reason": run.reason,
        "host": run.host or None,
        "version": run.version or None,
    }


def table_of(listed: Sequence[RunSummary], width: int) -> Table:
    """The table of some runs, for a terminal of a width."""
    is_wide = width >= WIDE
    metrics = {run.best.metric for run in listed if run.best is not None}
    one_metric = metrics.pop() if len(metrics) == 1 else ""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1 if is_wide else 0))
    table.add_column("run", overflow="fold", min_width=12)
    if is_wide:
        table.add_column("kind", no_wrap=True)
    table.add_column("ended", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    held_out = f"held-out\n{_short_name(one_metric)}" if one_metric else "held-out"
    table.add_column(held_out, justify="right", no_wrap=is_wide)
    if is_wide:
        table.add_column("at step", justify="right", no_wrap=True)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("started", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for run in listed:
        table.add_row(*_row(run, one_metric, is_wide))
    return table


def _row(run: RunSummary, one_metric: str, is_wide: bool) -> list[Text]:
    best = run.best
    held_out = ""
    if best is not None:
        held_out = figure(best.value, best.low, best.high) if is_wide else figure(best.value)
        held_out += "" if best.metric == one_metric else f" {_short_name(best.metric)}"
    steps = f"{run.step}/{run.max_steps}" if run.max_steps is not None else str(run.step)
    style = "dim" if run.outcome == NO_RUN else ""
    cells = [
        Text(plain(run.name), style),
        Text(run.outcome, COLORS.get(run.outcome, "dim")),
        Text("" if run.outcome == NO_RUN else steps, style),
        Text(held_out),
        Text(figure(run.rewards[-1]) if run.rewards else ""),
        Text(local_time(run.started_at, with_year=is_wide), style),
        Text(duration(run.duration_s)),
        Text(size(run.size_bytes), style),
    ]
    at_step = Text("" if best is None else str(best.step))
    return [cells[0], Text(run.kind), *cells[1:4], at_step, *cells[4:]] if is_wide else cells


def _short_name(metric: str) -> str:
    return metric.removeprefix("rollout/").removesuffix("/mean")


def _notes(listed: Sequence[RunSummary], root: Path, num_hidden: int, num_cut: int, is_empty: bool) -> list[str]:
    """Lines below the table: reasons, and what it does not show."""
    if is_empty:
        return [f"there are no runs under {plain(str(root))}: fuchsia fit --config quickstart.yaml makes one"]
    reasons = [run for run in listed if run.outcome == "failed" and run.reason]
    notes = [plain(f"{run.name}: {run.reason}") for run in reasons[:NUM_REASONS]]
    if len(reasons) > NUM_REASONS:
        notes.append(f"{len(reasons) - NUM_REASONS} more have failed: --json has their reasons")
    hosts = sorted({run.host for run in listed if run.outcome == "running" and not is_of_this_machine(run.host)})
    if hosts:
        notes.append(plain(f"whether runs of other machines ({', '.join(hosts)}) still go cannot be seen from here"))
    if any(run.outcome == NO_RUN for run in listed):
        notes.append("no run: the folder has neither config.yaml nor run.json")
    if num_cut:
        notes.append(f"{num_cut} older ones are left out by --limit")
    if num_hidden:
        notes.append(f"not shown: {num_hidden} of evaluations, tests and predictions (--all)")
    if not listed and not num_hidden:
        notes.append("no run matches")
    return notes


def _is_wanted(run: RunSummary, pattern: str | None, outcome: str | None) -> bool:
    by_name = pattern is None or fnmatch.fnmatchcase(run.name, pattern) or fnmatch.fnmatchcase(run.config, pattern)
    return by_name and (outcome is None or run.outcome == outcome)


def _write_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")
