"""The console script: prints help, version and completion itself, and imports torch only for the other commands."""

import os
import sys

from fuchsia_pl.cli.answers import answer


def main() -> None:
    """Runs the command. Environments are found in the current folder too, as with `python -m`.

    The exit code is 2 if a setting is refused, 143 or 130 after SIGTERM or SIGINT, and 1 if anything else fails.
    `--debug`, an option of every command, adds the traceback to errors that are otherwise one line.
    """
    sys.path.append(os.getcwd())
    answer(sys.argv[1:])
    from fuchsia_pl.cli.run_command import run_command  # imports torch, Lightning and transformers

    run_command(sys.argv[1:])
