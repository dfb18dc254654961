"""The console script: prints help, version and completion itself, and imports torch only for the other commands."""

import os
import sys

from fuchsia_pl.cli.answers import answer


def main() -> None:
    """Runs the command. The working directory is first on the module search path, as with `python -m`.

    Processes that this one starts with `multiprocessing` (vLLM's workers) get the same path; ranks run this function.

    The exit code is 2 if a setting is refused, 143 or 130 after SIGTERM or SIGINT, and 1 if anything else fails.
    `--debug`, an option of every command, adds the traceback to errors that are otherwise one line.
    """
    put_working_directory_first()
    answer(sys.argv[1:])
    from fuchsia_pl.cli.run_command import run_command  # imports torch, Lightning and transformers

    run_command(sys.argv[1:])


def put_working_directory_first() -> None:
    """Makes modules in the working directory importable before installed ones of the same name."""
    folder = os.getcwd()
    sys.path[:] = [folder, *(entry for entry in sys.path if entry not in ("", folder))]
