"""`fuchsia doctor`: checks the machine, a config on it, and a first step; prints a table with what to do for each finding."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from fuchsia_pl.cli import doctor_machine as machine
from fuchsia_pl.cli.diagnosis import Check, Finding, bounded, worst
from fuchsia_pl.cli.doctor_config import ConfigChecks, DoctorCLI
from fuchsia_pl.cli.doctor_step import CLOSING_S, trial_step
from fuchsia_pl.cli.options import doctor_options
from fuchsia_pl.cli.run_folder import CONFIG_OPTIONS, DEFAULT_ROOT
from fuchsia_pl.cli.terminal import plain

QUICK_S = 30.0
HUB_S = 10.0
CONFIG_S = 120.0
# A model may be converted first, and thousands of prompts are rendered.
MODEL_S = 600.0
COLORS = {"ok": "green", "note": "dim", "warning": "yellow", "problem": "red"}


def doctor(arguments: list[str]) -> int:
    """Runs `fuchsia doctor`; returns the exit code, 1 if there is a problem."""
    parser = doctor_options()
    given, words = parser.parse_known_args(arguments)
    if given.step and not words:
        parser.error("--step runs a step of a config: add --config NAME")
    if given.step_bound <= 0:
        parser.error(f"--step-bound must be above 0, got {given.step_bound:g}")
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    findings = examined(words, given.step, given.step_bound)
    if given.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        report(Console(highlight=False), findings)
    return 1 if worst(findings) == "problem" else 0


def examined(words: list[str], with_step: bool, step_bound_s: float) -> list[Finding]:
    """All findings.

    Args:
        words: Options of `fuchsia fit`; none for the machine alone.
        with_step: Whether a step is run.
        step_bound_s: Seconds that it may take.
    """
    parsed: list[DoctorCLI] = []

    def parse() -> list[Finding]:
        parsed.append(DoctorCLI(["fit", *words]))
        return [Finding("settings", "ok", shown_configs(words))]

    settings = _one("settings", parse, CONFIG_S) if words else []
    checks = ConfigChecks(parsed[0]) if parsed else None
    model = _one("model", checks.model, MODEL_S) if checks is not None else []
    found = [*settings, *model]
    is_usable = checks is not None and worst(model) in ("ok", "warning")
    if checks is not None and is_usable:
        for name in ("tokenizer", "template", "adapter", "memory plan", "environment"):
            found += _one(name, getattr(checks, name.split()[0]), MODEL_S)
    findings = [*_machine(checks, is_usable), *found]
    if with_step and checks is not None:
        step = partial(trial_step, words, checks.step_size, step_bound_s)
        findings += _one("one step", step, step_bound_s + 2 * CLOSING_S)
    return findings


def shown_configs(words: Sequence[str]) -> str:
    """The configs of a command line, and the number of its other options.

    >>> shown_configs(["--config", "a.yaml", "--config=b.yaml", "--data.batch_size", "4"])
    'a.yaml, b.yaml, 1 other option'
    """
    names: list[str] = []
    number = 0
    for position, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in CONFIG_OPTIONS:
            names.append(value if equals else (words[position + 1] if position + 1 < len(words) else ""))
        else:
            number += word.startswith("-")
    return ", ".join([*names, *([f"{number} other option{'s' if number > 1 else ''}"] if number else [])])


def report(console: Console, findings: Sequence[Finding]) -> None:
    """Prints the table and a last line."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found, and what to do", overflow="fold")
    for finding in findings:
        text = Text(plain(finding.text))
        if finding.advice:
            text.append(f"\n-> {plain(finding.advice)}", "bold" if finding.state == "problem" else "")
        table.add_row(Text(finding.state, COLORS[finding.state]), Text(finding.check), text)
    console.print(table)
    counts = [(state, sum(finding.state == state for finding in findings)) for state in ("problem", "warning")]
    words = [f"{number} {state}{'s' if number > 1 else ''}" for state, number in counts if number]
    console.print()
    console.print(Text(" and ".join(words) if words else "nothing is wrong"))


def _machine(checks: ConfigChecks | None, is_usable: bool) -> list[Finding]:
    root = checks.cli.root if checks is not None else Path(DEFAULT_ROOT)

    def disk() -> list[Finding]:
        return machine.disk(root, checks.disk_bytes if checks is not None and is_usable else None)

    limited: list[tuple[str, Check, float]] = [
        ("libraries", machine.packages, QUICK_S),
        ("devices", partial(machine.devices, None if checks is None else checks.dtypes), QUICK_S),
        (
            "vllm",
            partial(machine.vllm_build, checks is None or checks.needs_vllm),
            machine.IMPORT_TIMEOUT_S + QUICK_S,
        ),
        ("hub", machine.hub, HUB_S),
        ("shared memory", machine.shared_memory, QUICK_S),
        ("disk", disk, QUICK_S),
        ("memory", machine.memory, QUICK_S),
        ("open files", machine.open_files, QUICK_S),
    ]
    return [finding for name, check, seconds in limited for finding in _one(name, check, seconds)]


def _one(name: str, check: Check, timeout_s: float) -> list[Finding]:
    with _shown(name):
        return bounded(name, check, timeout_s)


@contextmanager
def _shown(name: str) -> Iterator[None]:
    """Shows the name of the check on a terminal until it ends."""
    if not sys.stderr.isatty():
        yield
        return
    sys.stderr.write(f"checking: {name}\x1b[K\r")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\x1b[K")
        sys.stderr.flush()
