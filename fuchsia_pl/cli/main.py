"""The console script."""

import os
import sys
import traceback

from fuchsia_pl.cli.app import FuchsiaCLI
from fuchsia_pl.cli.chatter import show_warnings
from fuchsia_pl.cli.check_env import check_env
from fuchsia_pl.cli.failures import DEBUG_OPTION
from fuchsia_pl.cli.serve import serve
from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.envs.tools.spec import ToolServerError
from fuchsia_pl.files import DiskError


def main() -> None:
    """Runs the command. Environments are found in the current folder too, as with `python -m`.

    The exit code is 2 where a setting is refused and 1 where anything else fails. `--debug`, which every command takes, adds
    the traceback to an error that is otherwise one line.
    """
    sys.path.append(os.getcwd())
    show_warnings()
    is_debugging = DEBUG_OPTION in sys.argv
    try:
        _run([word for word in sys.argv[1:] if word != DEBUG_OPTION])
    except SystemExit as end:
        if is_debugging and end.__cause__ is not None:
            traceback.print_exception(end.__cause__)
        raise
    except (EngineError, ToolServerError, DiskError) as error:
        # Errors of another process or of a disk: where this one stood when it met them is no help.
        if is_debugging:
            raise
        sys.stderr.write("\n".join([f"error: {error}", *error.__dict__.get("__notes__", ())]) + "\n")
        sys.exit(1)


def _run(words: list[str]) -> None:
    if words[:1] == ["check-env"]:
        sys.exit(check_env(words[1:]))
    if words[:1] == ["serve"]:
        serve(words[1:])
    FuchsiaCLI(words)
