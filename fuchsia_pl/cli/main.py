"""The console script."""

import os
import sys
import traceback

from fuchsia_pl.callbacks.finite import NonFiniteError
from fuchsia_pl.cli.app import FuchsiaCLI
from fuchsia_pl.cli.chatter import show_warnings
from fuchsia_pl.cli.check_env import check_env
from fuchsia_pl.cli.ending import leave_stopped
from fuchsia_pl.cli.failures import DEBUG_OPTION
from fuchsia_pl.cli.launch import to_first_rank
from fuchsia_pl.cli.replay import replay
from fuchsia_pl.cli.serve import serve
from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.envs.tools.spec import ToolServerError
from fuchsia_pl.envs.user_code import ends_by_itself
from fuchsia_pl.files import DiskError
from fuchsia_pl.stopping import stopping


def main() -> None:
    """Runs the command. The working directory is first on the module search path, as with `python -m`.

    Processes that this one starts with `multiprocessing` (vLLM's workers) get the same path; ranks run this function.

    The exit code is 2 where a setting is refused, 143 or 130 after SIGTERM or SIGINT, and 1 where anything else fails.
    `--debug`, which every command takes, adds the traceback to an error that is otherwise one line.
    """
    put_working_directory_first()
    show_warnings()
    words, is_debugging = [word for word in sys.argv[1:] if word != DEBUG_OPTION], DEBUG_OPTION in sys.argv
    with stopping.handled(), ends_by_itself():
        stopping.forward = to_first_rank()
        try:
            _run(words)
        except BaseException as end:
            if stopping.signum is not None:
                if is_debugging:
                    traceback.print_exception(end)
                leave_stopped(words, end)
            _report(end, is_debugging)
            raise
        if stopping.signum is not None:
            leave_stopped(words, None)


def put_working_directory_first() -> None:
    """Makes modules in the working directory importable before installed ones of the same name."""
    folder = os.getcwd()
    sys.path[:] = [folder, *(entry for entry in sys.path if entry not in ("", folder))]


def _report(end: BaseException, is_debugging: bool) -> None:
    """Prints what ended the command, where that takes one line; raises where that decides the exit code."""
    if isinstance(end, SystemExit) and is_debugging and end.__cause__ is not None:
        traceback.print_exception(end.__cause__)
    # Errors of another process, a disk or numbers: where this one stood when it met them is no help.
    if isinstance(end, EngineError | ToolServerError | DiskError | NonFiniteError) and not is_debugging:
        sys.stderr.write("\n".join([f"error: {end}", *end.__dict__.get("__notes__", ())]) + "\n")
        sys.exit(1)


def _run(words: list[str]) -> None:
    if words[:1] == ["check-env"]:
        sys.exit(check_env(words[1:]))
    if words[:1] == ["replay"]:
        sys.exit(replay(words[1:]))
    if words[:1] == ["serve"]:
        serve(words[1:])
    FuchsiaCLI(words)
