"""Command lines that are answered without torch: help, version, completion, unknown commands, list and report of runs."""

import sys

import fuchsia_pl
from fuchsia_pl.cli.commands import (
    COMMANDS,
    DEBUG_OPTION,
    HELP_OPTIONS,
    RUN_COMMANDS,
    is_help,
    overview,
    unknown_command,
)
from fuchsia_pl.cli.completion import bash_completion
from fuchsia_pl.cli.help_page import help_page, packaged_table
from fuchsia_pl.cli.options import OPTIONS, completion_options, runs_diff_options


def answer(arguments: list[str]) -> None:
    """Answers a command line and exits, or returns if it takes the whole program.

    Raises:
        SystemExit: The command line is answered: code 0, or 2 if there is no such command.
    """
    words = [word for word in arguments if word != DEBUG_OPTION]
    if not words:
        sys.stderr.write(overview())
        sys.exit(2)
    first, *rest = words
    if first in HELP_OPTIONS:
        _write(overview())
    elif first == "--version":
        _write(f"fuchsia {fuchsia_pl.__version__}\n")
    elif first in RUN_COMMANDS and len(rest) == 1 and is_help(rest[0]):
        _write(help_page(first, packaged_table(), with_all=rest[0] not in HELP_OPTIONS))
    elif first in OPTIONS and any(is_help(word) for word in rest):
        options = runs_diff_options if words[:2] == ["runs", "diff"] else OPTIONS[first]
        _write(options().format_help())
    elif first == "runs":
        from fuchsia_pl.cli.runs import runs  # imports rich and yaml

        sys.exit(runs(rest))
    elif first == "report":
        from fuchsia_pl.cli.report import report

        sys.exit(report(rest))
    elif first == "completion":
        completion_options().parse_args(rest)
        _write(bash_completion(packaged_table()))
    elif first not in COMMANDS and not first.startswith("-"):
        sys.stderr.write(f"error: {unknown_command(first)}\nAll commands: fuchsia --help\n")
        sys.exit(2)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.exit(0)
