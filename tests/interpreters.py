"""A running server of interpreters for tests."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from fuchsia_pl.envs import MCPServer
from fuchsia_pl.envs.tools.mcp import ToolServer

ROOT = Path(__file__).parents[1]
SERVER = "fuchsia_pl.library.function_calling.server"
COMMAND = [sys.executable, "-P", "-m", SERVER, "--time-limit-s", "1.5", "--memory-mb", "512"]
MARKER = "fuchsia-left-behind"
# Runs the rest of the command as an unprivileged user who can enter the folders of this Python (requires root).
_AS_USER = """
import os, sys
from fuchsia_pl.library.function_calling import mounts
assert mounts.LIBC.unshare(mounts.CLONE_NEWNS) == 0
mounts.mount(None, "/", None, mounts.MS_REC | mounts.MS_PRIVATE)
closed = [str(mounts.closed_ancestor(mounts.Path(folder))) for folder in mounts.closed_folders()]
mounts.cover(closed, {}, mounts.python_folders())
os.setgroups([]); os.setgid(65534); os.setuid(65534)
"""
# Runs it on a system without namespaces.
_APART_FROM_NOTHING = "from fuchsia_pl.library.function_calling import syscalls; syscalls.deny()\n"
_EXEC = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
AS_USER = [sys.executable, "-P", "-c", _AS_USER + _EXEC]
AS_WEAK_USER = [sys.executable, "-P", "-c", _AS_USER + _APART_FROM_NOTHING + _EXEC]


class Interpreter:
    """A running server and an event loop to call it from."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self.runner = asyncio.Runner()
        # Imports the code of this checkout, not an installed package.
        config = MCPServer(command=command, env={"PYTHONPATH": str(ROOT)}, end_session_tool="end_session")
        self.server = ToolServer(config)
        self.runner.run(self.server.ensure_running())

    def cells(self, *codes: str, key: str = "a") -> list[tuple[str, str]]:
        """Runs cells of a rollout; returns the results for the policy, and the statuses."""

        async def run():
            found = []
            for code in codes:
                result = await self.server.call(key, "python", {"code": code})
                found.append((result.text, str(result.status)))
            return found

        return self.runner.run(run())

    def sessions(self, number: int, at_a_time: int = 4) -> None:
        """Runs one cell in each of some rollouts, then ends the rollouts."""

        async def sessions(start: int) -> None:
            for key in (f"session {i}" for i in range(start, number, at_a_time)):
                result = await self.server.call(key, "python", {"code": "x = 1; x"})
                assert result.text == "1", result
                await self.server.end_session(key)

        async def run() -> None:
            await asyncio.gather(*(sessions(start) for start in range(at_a_time)))

        self.runner.run(run())

    def end(self, key: str) -> None:
        """Ends a rollout."""
        self.runner.run(self.server.end_session(key))

    def stop(self) -> None:
        """Stops the server."""
        self.runner.run(self.server.stop())
        self.runner.close()


def descendants() -> set[psutil.Process]:
    """All descendants of this process."""
    return set(psutil.Process().children(recursive=True))


def runs(process: psutil.Process, module: str) -> bool:
    """Whether a process runs this module."""
    try:
        return module in process.cmdline()
    except psutil.Error:  # it has ended, or its parent has not reaped it yet
        return False


def marked() -> list[psutil.Process]:
    """Processes that a cell has started with the marker in the command line."""
    return [p for p in psutil.process_iter(["cmdline"]) if MARKER in " ".join(p.info["cmdline"] or [])]
