"""The process that holds a rollout's interpreter. It is forked from one that has loaded IPython already."""

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

from envs.function_calling import wire


class OutputLimitReached(BaseException):
    """A cell printed more than it may."""


class PlainDisplayHook(DisplayHook):
    """Shows the value of a cell's last expression without `Out[1]:` before it."""

    def write_output_prompt(self) -> None:
        """Writes nothing."""


class PlainShell(InteractiveShell):
    """IPython without colours, history and files of its own."""

    displayhook_class = Type(PlainDisplayHook)

    def ask_exit(self) -> None:
        """What `exit()` calls. The interpreter ends with the rollout."""


class BoundedOutput:
    """Collects what a cell prints and ends the cell once that is too much."""

    encoding = "utf-8"

    def __init__(self, max_chars: int) -> None:
        self.max_chars = max_chars
        self.parts: list[str] = []
        self.num_chars = 0

    def write(self, text: str) -> int:
        """Keeps the text as far as there is room."""
        room = self.max_chars - self.num_chars
        self.parts.append(text[:room])
        self.num_chars += min(len(text), room)
        if len(text) > room:
            raise OutputLimitReached
        return len(text)

    def flush(self) -> None:
        """There is nothing to flush to."""

    def isatty(self) -> bool:
        """It is not."""
        return False

    def text(self) -> str:
        """All that was kept."""
        return "".join(self.parts)


def make_shell() -> InteractiveShell:
    """An interpreter, before anything ran in it."""
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.xmode = "Minimal"
    config.InteractiveShell.colors = "nocolor"
    config.BaseIPythonApplication.auto_create = False
    os.environ["IPYTHONDIR"] = tempfile.gettempdir()
    return PlainShell.instance(config=config)


def serve(shell: InteractiveShell, channel: socket.socket, max_output_chars: int) -> None:
    """Runs cells until the other side closes the channel."""
    own_pid = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel.sendall(wire.READY)
    while (request := wire.read_request(channel)) is not None:
        nonce, code = request
        _bury_children()
        failed, output = run_cell(shell, code, max_output_chars)
        if os.getpid() != own_pid:  # the cell forked, and this is the child, which has come to its end
            os._exit(0)
        _bury_children()
        channel.sendall(wire.reply(nonce, failed, output))


def run_cell(shell: InteractiveShell, code: str, max_output_chars: int) -> tuple[bool, str]:
    """Runs a cell.

    Returns:
        Whether it failed, and what it printed, with the value of its last expression.
    """
    output: Any = BoundedOutput(max_output_chars)
    failed = True
    streams = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = output
    try:
        failed = not shell.run_cell(code, store_history=False).success
    except OutputLimitReached:
        pass
    except BaseException as error:  # whatever leaves a cell is what the cell did
        output.parts.append(f"{type(error).__name__}: {error}"[:max_output_chars])
    finally:
        sys.stdout, sys.stderr = streams
    return failed, output.text()[:max_output_chars]


def _bury_children() -> None:
    """Children that have ended count against the number of processes until somebody asks for them."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
