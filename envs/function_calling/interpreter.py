"""The process that holds a rollout's interpreter. It is forked from one that has loaded IPython already."""

import contextlib
import json
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

OK, ERROR, OUTPUT_LIMIT = "ok", "error", "output_limit"


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
    """Runs cells until the other side closes the channel. A request and a reply are a line each."""
    own_pid = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stream = channel.makefile("rwb")
    for line in stream:
        _bury_children()
        reply = run_cell(shell, json.loads(line)["code"], max_output_chars)
        if os.getpid() != own_pid:  # the cell forked, and this is the child, which has come to its end
            os._exit(0)
        _bury_children()
        stream.write(json.dumps(reply).encode() + b"\n")
        stream.flush()


def run_cell(shell: InteractiveShell, code: str, max_output_chars: int) -> dict[str, str]:
    """Runs a cell; what it prints and the value of its last expression are its output."""
    output: Any = BoundedOutput(max_output_chars)
    status = OK
    streams = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = output
    try:
        result = shell.run_cell(code, store_history=False)
        status = OK if result.success else ERROR
    except OutputLimitReached:
        status = OUTPUT_LIMIT
    except BaseException as error:  # whatever leaves a cell is what the cell did
        status = ERROR
        output.parts.append(f"{type(error).__name__}: {error}"[:max_output_chars])
    finally:
        sys.stdout, sys.stderr = streams
    if output.num_chars >= max_output_chars:
        status = OUTPUT_LIMIT
    return {"output": output.text(), "status": status}


def _bury_children() -> None:
    """Children that have ended count against the number of processes until somebody asks for them."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
