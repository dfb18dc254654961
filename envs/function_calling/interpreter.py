"""The process that runs the interpreter of one rollout. It is forked from a process that has loaded IPython."""

import contextlib
import os
import signal
import socket
import sys
import tempfile
from typing import Any

from IPython.core.displayhook import DisplayHook
from IPython.core.interactiveshell import InteractiveShell
from traitlets import Type
from traitlets.config import Config

from fuchsia_pl.library.function_calling import wire


class OutputLimitReached(BaseException):
    """A cell printed more than the limit."""


class PlainDisplayHook(DisplayHook):
    """Prints the value of a cell's last expression without the prefix `Out[1]:`."""

    def write_output_prompt(self) -> None:
        """Writes nothing."""


class PlainShell(InteractiveShell):
    """IPython without colours, history and its own files."""

    displayhook_class = Type(PlainDisplayHook)

    def ask_exit(self) -> None:
        """Does nothing when a cell calls `exit()`. The interpreter ends with the rollout."""


class BoundedOutput:
    """Collects the output of a cell and ends the cell at a limit."""

    encoding = "utf-8"

    def __init__(self, max_chars: int) -> None:
        self.max_chars = max_chars
        self.parts: list[str] = []
        self.num_chars = 0

    def write(self, text: str) -> int:
        """Keeps the text up to the limit."""
        room = self.max_chars - self.num_chars
        self.parts.append(text[:room])
        self.num_chars += min(len(text), room)
        if len(text) > room:
            raise OutputLimitReached
        return len(text)

    def flush(self) -> None:
        """Does nothing: there is no underlying stream."""

    def isatty(self) -> bool:
        """False: the output is not a terminal."""
        return False

    def text(self) -> str:
        """The collected output."""
        return "".join(self.parts)


def make_shell() -> InteractiveShell:
    """A new interpreter."""
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.xmode = "Minimal"
    config.InteractiveShell.colors = "nocolor"
    config.BaseIPythonApplication.auto_create = False
    os.environ["IPYTHONDIR"] = tempfile.gettempdir()
    return PlainShell.instance(config=config)


def serve(shell: InteractiveShell, channel: socket.socket, max_output_chars: int) -> None:
    """Runs cells until the server closes the channel."""
    own_pid = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel.sendall(wire.READY)
    while (request := wire.read_request(channel)) is not None:
        nonce, code = request
        _reap_children()
        failed, output = run_cell(shell, code, max_output_chars)
        if os.getpid() != own_pid:  # the cell forked, and this is the child at its end
            os._exit(0)
        _reap_children()
        channel.sendall(wire.reply(nonce, failed, output))


def run_cell(shell: InteractiveShell, code: str, max_output_chars: int) -> tuple[bool, str]:
    """Runs a cell.

    Returns:
        Whether it failed, and its output, including the value of its last expression.
    """
    output: Any = BoundedOutput(max_output_chars)
    failed = True
    streams = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = output
    try:
        failed = not shell.run_cell(code, store_history=False).success
    except OutputLimitReached:
        pass
    except BaseException as error:  # any exception that leaves the cell was raised by its code
        output.parts.append(f"{type(error).__name__}: {error}"[:max_output_chars])
    finally:
        sys.stdout, sys.stderr = streams
    return failed, output.text()[:max_output_chars]


def _reap_children() -> None:
    """Reaps children that have ended. Until then they count towards the limit of processes."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
