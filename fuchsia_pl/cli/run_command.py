"""Runs a command: signals, one-line errors and exit codes."""

import sys
import traceback
from collections.abc import Callable

from fuchsia_pl.callbacks.finite import NonFiniteError
from fuchsia_pl.cli.app import FuchsiaCLI
from fuchsia_pl.cli.chat import chat
from fuchsia_pl.cli.chatter import show_warnings
from fuchsia_pl.cli.check_env import check_env
from fuchsia_pl.cli.commands import DEBUG_OPTION, RUN_COMMANDS, is_help
from fuchsia_pl.cli.doctor import doctor
from fuchsia_pl.cli.ending import leave_stopped, resume_lines
from fuchsia_pl.cli.evaluate import evaluate
from fuchsia_pl.cli.launch import is_first_rank, to_first_rank
from fuchsia_pl.cli.plan import plan
from fuchsia_pl.cli.predict import predict
from fuchsia_pl.cli.replay import replay
from fuchsia_pl.cli.serve import serve
from fuchsia_pl.cli.settings_table import print_help
from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.envs.tools.spec import ToolServerError
from fuchsia_pl.envs.user_code import ends_by_itself
from fuchsia_pl.files import DiskError
from fuchsia_pl.stopping import stopping


def export(words: list[str]) -> int:
    """Runs `fuchsia export`, whose format GGUF needs a library that takes two seconds to import."""
    from fuchsia_pl.cli.export import export

    return export(words)


# The commands that define their own options, by name. Each function gets the words after the name and returns the exit code.
HANDLERS: dict[str, Callable[[list[str]], int]] = {
    "chat": chat,
    "check-env": check_env,
    "doctor": doctor,
    "export": export,
    "eval": evaluate,
    "plan": plan,
    "predict": predict,
    "replay": replay,
    "serve": serve,
}


def run_command(arguments: list[str]) -> None:
    """Runs the command of a command line; see `main` for the exit codes."""
    show_warnings()
    words, is_debugging = [word for word in arguments if word != DEBUG_OPTION], DEBUG_OPTION in arguments
    with stopping.handled(), ends_by_itself():
        stopping.forward = to_first_rank()
        try:
            _run(words)
        except BaseException as end:
            if stopping.signum is not None:
                if is_debugging:
                    traceback.print_exception(end)
                leave_stopped(words, end)
            _report(end, words, is_debugging)
            raise
        if stopping.signum is not None:
            leave_stopped(words, None)


def _report(end: BaseException, words: list[str], is_debugging: bool) -> None:
    """Prints errors that take one line and exits with code 1; returns if the exception itself sets the exit code."""
    if isinstance(end, SystemExit) and is_debugging and end.__cause__ is not None:
        traceback.print_exception(end.__cause__)
    advice = resume_lines(words) if is_first_rank() and not isinstance(end, SystemExit) else []
    # These errors have their cause in another process, a disk or numbers: a traceback of this process does not help.
    if isinstance(end, EngineError | ToolServerError | DiskError | NonFiniteError) and not is_debugging:
        sys.stderr.write("\n".join([f"error: {end}", *end.__dict__.get("__notes__", ()), *advice]) + "\n")
        sys.exit(1)
    sys.stderr.write("".join(f"{line}\n" for line in advice))


def _run(words: list[str]) -> None:
    if words and words[0] in RUN_COMMANDS and any(is_help(word) for word in words):
        print_help(words)
    elif words and words[0] in HANDLERS:
        sys.exit(HANDLERS[words[0]](words[1:]))
    else:
        FuchsiaCLI(words)
