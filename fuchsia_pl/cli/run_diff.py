"""`fuchsia runs diff`: the settings and the figures of two runs, side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fuchsia_pl.cli.run_folder import SAVED_CONFIG, SAVED_OBJECTIVE
from fuchsia_pl.cli.run_summary import HeldOutFigure, RunSummary, summary
from fuchsia_pl.cli.terminal import duration, figure, plain, size
from fuchsia_pl.types import ConfigError

UNSET = "-"
MAX_VALUE_CHARS = 200

Pair = tuple[str, str]


@dataclass(frozen=True)
class Difference:
    """Two runs compared.

    Attributes:
        names: Names of the runs.
        settings: Settings that differ, each with both values as text; "-" where a run does not have it.
        num_same: Number of settings with the same value.
        objective: Parts of the resolved objective that differ.
        figures: Facts and figures of both.

    >>> Difference(("a/0", "a/1"), {"trainer.max_steps": ("2", "3")}, 170, {}, {}).num_same
    170
    """

    names: Pair
    settings: dict[str, Pair]
    num_same: int
    objective: dict[str, Pair]
    figures: dict[str, Pair]


def compared(a: Path, b: Path, root: Path) -> Difference:
    """Compares two run folders.

    Raises:
        ConfigError: The `config.yaml` of one cannot be read.
    """
    settings, num_same = differing(_read(a / SAVED_CONFIG), _read(b / SAVED_CONFIG))
    objectives = [_read(folder / SAVED_OBJECTIVE) if (folder / SAVED_OBJECTIVE).is_file() else {} for folder in (a, b)]
    # A run that was refused early has no objective, which says nothing about it.
    objective = differing(*objectives)[0] if all(objectives) else {}
    first, second = summary(a, root), summary(b, root)
    rows_a, rows_b = _facts(first), _facts(second)
    figures = {name: (rows_a.get(name, ""), rows_b.get(name, "")) for name in {**rows_a, **rows_b}}
    return Difference(
        (first.name, second.name),
        settings,
        num_same,
        {name: pair for name, pair in objective.items() if settings.get(name) != pair},
        {name: pair for name, pair in figures.items() if any(pair)},
    )


def differing(a: Mapping[str, str], b: Mapping[str, str]) -> tuple[dict[str, Pair], int]:
    """The entries that differ, and the number of those that are the same.

    >>> differing({"lr": "0.1", "r": "4"}, {"lr": "0.2", "r": "4", "seed": "1"})
    ({'lr': ('0.1', '0.2'), 'seed': ('-', '1')}, 1)
    """
    names = [*a, *(name for name in b if name not in a)]
    pairs = {name: (a.get(name, UNSET), b.get(name, UNSET)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}, sum(x == y for x, y in pairs.values())


def flattened(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and texts.

    >>> flattened({"model": {"lr": 0.1, "betas": [0.9, 0.99]}, "data": {}})
    {'model.lr': '0.1', 'model.betas': '[0.9, 0.99]', 'data': '{}'}
    >>> flattened({"trainer": {"callbacks": [{"class_path": "A"}, {"class_path": "B"}]}})
    {'trainer.callbacks.0.class_path': 'A', 'trainer.callbacks.1.class_path': 'B'}
    """
    if isinstance(value, dict) and value:
        parts = value.items()
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        parts = dict(enumerate(value)).items()
    else:
        return {prefix: "null" if value is None else str(value)}
    found: dict[str, str] = {}
    for name, part in parts:
        found |= flattened(part, f"{prefix}.{name}" if prefix else str(name))
    return found


def print_difference(console: Console, difference: Difference) -> None:
    """Prints a table for each part that has rows."""
    _print_table(console, "settings that differ", difference.names, difference.settings)
    _print_table(console, "objective", difference.names, difference.objective)
    _print_table(console, "figures", difference.names, difference.figures)
    number = len(difference.settings)
    differ = "no setting differs" if number == 0 else f"{number} setting{'s differ' if number > 1 else ' differs'}"
    console.print(Text(f"{differ}, {difference.num_same} are the same"), soft_wrap=True)


def _print_table(console: Console, title: str, names: Pair, rows: Mapping[str, Pair]) -> None:
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column(title, overflow="fold", max_width=max(console.width // 2, 20))
    for name in names:
        table.add_column(plain(name), overflow="fold")
    for name, pair in rows.items():
        table.add_row(Text(plain(name)), *(Text(plain(_shortened(value))) for value in pair))
    console.print(table)
    console.print()


def _shortened(value: str) -> str:
    return value if len(value) <= MAX_VALUE_CHARS else f"{value[:MAX_VALUE_CHARS]} … ({len(value)} characters)"


def _facts(run: RunSummary) -> dict[str, str]:
    steps = f"{run.step} of {run.max_steps}" if run.max_steps is not None else str(run.step)
    facts = {
        "command": run.kind,
        "version": run.version,
        "host": run.host,
        "ended": run.outcome + (f": {run.reason}" if run.reason else ""),
        "steps": steps,
        "time": duration(run.duration_s),
        "size": size(run.size_bytes),
    }
    if run.rewards:
        facts |= {"reward, last": figure(run.rewards[-1]), "reward, best": figure(max(run.rewards))}
    if run.best is not None:
        name = f"held-out {run.best.metric.removeprefix('rollout/')}"
        facts |= {
            f"{name}, first": _at(run.held_out[0]),
            f"{name}, last": _at(run.held_out[-1]),
            f"{name}, best": _at(run.best),
        }
    return facts


def _at(held_out: HeldOutFigure) -> str:
    return f"{figure(held_out.value, held_out.low, held_out.high)} at step {held_out.step}"


def _read(path: Path) -> dict[str, str]:
    """The flattened content of a YAML file."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}): compare another run") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no settings: compare another run")
    return flattened(loaded)
