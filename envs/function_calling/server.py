"""An MCP server whose tool is an IPython interpreter, one for each rollout.

It is started with `python -m fuchsia_pl.library.function_calling.server`, serves over stdin and stdout, and ends with its client.
The state of an interpreter lasts for one rollout and is not visible to others. `sandbox.py` describes the protection.
"""

import argparse
import asyncio
import json
import os
import resource
import secrets
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastmcp import Context, FastMCP
from fastmcp.tools import ToolResult

from fuchsia_pl.library.function_calling import mounts, sandbox, wire
from fuchsia_pl.library.function_calling.sandbox import Limits, Offer

# `_meta` keys of `fuchsia_pl.envs.tools.mcp`. This process does not import it: that would take seconds.
ROLLOUT_KEY, STATUS_KEY = "fuchsia/rollout", "fuchsia/status"
OK, ERROR, TIMEOUT, KILLED, OUTPUT_LIMIT = "ok", "error", "timeout", "killed", "output_limit"
SERVER_DIED = "server_died"  # ends the rollout without a score: the policy did not cause the failure
START_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 5.0
MAX_SESSIONS = 500  # below UIDS_PER_SERVER: each has a user id
FORKS_AT_A_TIME = 16


class NotStartedError(RuntimeError):
    """An interpreter could not enter its sandbox."""


class Session:
    """The interpreter of a rollout. It is forked at the first cell, and again after it was lost.

    A cell can write to its own channel. The result is text with the status "ok" or "error", never another status.
    """

    def __init__(self, interpreters: "Interpreters") -> None:
        self._interpreters = interpreters
        self._lock = asyncio.Lock()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._lifeline: socket.socket | None = None
        self._number = -1

    async def run(self, code: str) -> tuple[str, str]:
        """Runs a cell. Returns the text for the policy and the status."""
        limit, max_chars = self._interpreters.time_limit_s, self._interpreters.max_output_chars
        async with self._lock:
            if self._reader is None:
                try:
                    await self._open()
                except (OSError, asyncio.IncompleteReadError, NotStartedError) as error:
                    sys.stderr.write(f"an interpreter did not start: {type(error).__name__}: {error}\n")
                    return "The interpreter did not start.", SERVER_DIED
            assert self._reader is not None
            assert self._writer is not None
            nonce = secrets.token_bytes(wire.NONCE_BYTES)
            try:
                self._writer.write(wire.request(nonce, code))
                failed, output = await asyncio.wait_for(wire.read_reply(self._reader, nonce, max_chars), limit)
            except TimeoutError:
                await self._kill()
                return f"The code took longer than {limit:g} s and was stopped. Its variables are lost.", TIMEOUT
            except wire.ForgedReply:
                await self._kill()
                return "The code wrote to the interpreter's own channel and was stopped. Its variables are lost.", ERROR
            except (ConnectionError, asyncio.IncompleteReadError):
                if await self._kill():
                    return "The code used too much memory and was stopped. Its variables are lost.", KILLED
                return "The interpreter died (memory, or the code ended it). Its variables are lost.", KILLED
            except asyncio.CancelledError:  # the cell still runs; its reply would be read as that of the next cell
                await self._kill()
                raise
        if len(output) >= max_chars:
            return f"{output}… (the output was too long, and the code was stopped there)", OUTPUT_LIMIT
        return output.strip() or "(no output)", ERROR if failed else OK

    async def close(self) -> None:
        """Ends the interpreter and all processes that it started."""
        async with self._lock:
            await self._kill()

    async def _open(self) -> None:
        async with self._interpreters.forks:
            self._number = self._interpreters.numbers.pop()
            channel, self._lifeline = self._interpreters.fork(self._number)
            try:
                self._reader, self._writer = await asyncio.open_connection(sock=channel)
                await asyncio.wait_for(_ready(self._reader), START_TIMEOUT_S)
            except BaseException:  # a start that fails or is cancelled leaves no process behind
                await self._kill()
                raise

    async def _kill(self) -> bool:
        """Ends the supervisor and its processes, and waits for it. Returns whether they exceeded the memory limit."""
        writer, self._reader, self._writer = self._writer, None, None
        lifeline, self._lifeline = self._lifeline, None
        if writer is not None:
            writer.transport.abort()
        if lifeline is None:
            return False
        try:
            lifeline.shutdown(socket.SHUT_WR)
            word = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(lifeline, 1), KILL_TIMEOUT_S)
            self._interpreters.numbers.append(self._number)
            return bool(word)
        except TimeoutError:
            sys.stderr.write(f"a supervisor did not end within {KILL_TIMEOUT_S:g} s\n")
            return False
        finally:
            lifeline.close()


async def _ready(reader: asyncio.StreamReader) -> None:
    """Waits until an interpreter is in its sandbox.

    Raises:
        NotStartedError: It failed; the message has its traceback.
        IncompleteReadError: It ended without a message.
    """
    first = await reader.readexactly(len(wire.READY))
    if first != wire.READY:
        raise NotStartedError((first + await reader.read()).decode(errors="replace"))


class Interpreters:
    """The sessions of all rollouts, and the process that forks their interpreters.

    Args:
        limits: Limits of each interpreter.
        time_limit_s: Time limit of each cell.
        max_output_chars: Output limit of each cell.
        offer: Parts of the sandbox that the system supports.
    """

    def __init__(self, limits: Limits, time_limit_s: float, max_output_chars: int, offer: Offer) -> None:
        self.time_limit_s = time_limit_s
        self.max_output_chars = max_output_chars
        self.numbers = list(range(sandbox.UIDS_PER_SERVER))  # free user numbers
        self.forks = asyncio.Semaphore(FORKS_AT_A_TIME)  # the socket has no room for more
        self._arguments = [json.dumps(asdict(limits)), str(max_output_chars), json.dumps(asdict(offer))]
        self._sessions: dict[str, Session] = {}
        self._control: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the process that forks interpreters, and waits until it is ready."""
        self._control, theirs = socket.socketpair()
        # -P: the working directory of the run must not be visible to interpreters.
        module = "fuchsia_pl.library.function_calling.zygote"
        command = [sys.executable, "-P", "-m", module, str(theirs.fileno()), *self._arguments]
        self._process = await asyncio.create_subprocess_exec(
            *command, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, stdout=sys.stderr
        )
        theirs.close()
        self._control.setblocking(False)
        ready = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._control, 1), START_TIMEOUT_S)
        if not ready:
            raise RuntimeError("the process that forks interpreters did not start; its output is above")
        self._watch = asyncio.create_task(self._end_with(self._process))

    async def _end_with(self, process: asyncio.subprocess.Process) -> None:
        """Ends this process after the one that forks interpreters. The client then starts a new server."""
        code = await process.wait()
        sys.stderr.write(f"the process that forks interpreters ended with {code}, and so does the server\n")
        os._exit(1)

    def fork(self, number: int) -> tuple[socket.socket, socket.socket]:
        """Forks an interpreter. Returns a channel to it and a lifeline to its supervisor, which ends both at a shutdown of it.

        Args:
            number: Number of its user, if the server is root.
        """
        assert self._control is not None
        channel, its_channel = socket.socketpair()
        lifeline, its_lifeline = socket.socketpair()
        with its_channel, its_lifeline:
            socket.send_fds(self._control, [wire.FORK.pack(number)], [its_channel.fileno(), its_lifeline.fileno()])
        channel.setblocking(False)
        lifeline.setblocking(False)
        return channel, lifeline

    async def run(self, key: str, code: str) -> tuple[str, str]:
        """Runs a cell in a rollout's interpreter."""
        if key not in self._sessions and len(self._sessions) >= MAX_SESSIONS:
            return f"There are {MAX_SESSIONS} sessions already, and none more can be opened.", ERROR
        return await self._sessions.setdefault(key, Session(self)).run(code)

    async def end(self, key: str) -> None:
        """Ends the session of a rollout."""
        session = self._sessions.pop(key, None)
        if session is not None:
            await session.close()

    async def stop(self) -> None:
        """Ends all sessions and the process that forks them."""
        await asyncio.gather(*(session.close() for session in self._sessions.values()))
        if self._watch is not None:
            self._watch.cancel()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


def make_server(interpreters: Interpreters) -> FastMCP:
    """The server with its two tools."""

    @asynccontextmanager
    async def lifespan(_: FastMCP) -> AsyncIterator[None]:
        await interpreters.start()
        try:
            yield
        finally:
            await interpreters.stop()

    server: FastMCP = FastMCP("ipython", lifespan=lifespan)

    @server.tool
    async def python(code: str, context: Context) -> ToolResult:
        """Runs Python code (IPython). Returns what it prints and the value of its last line. Variables stay for later calls."""
        output, status = await interpreters.run(_rollout(context), code)
        return ToolResult(content=output, meta={STATUS_KEY: status})

    @server.tool
    async def end_session(context: Context) -> str:
        """Ends the interpreter of a rollout."""
        await interpreters.end(_rollout(context))
        return "ended"

    return server


def _rollout(context: Context) -> str:
    meta: Any = context.request_context.meta if context.request_context is not None else None
    return str((meta or {}).get(ROLLOUT_KEY, "default"))


def refusal_of(offer: Offer, allows_weak: bool) -> str | None:
    """The reason why the server must not start, None if it may. Parts that are not covered are written to stderr."""
    if os.getuid() == 0 and not offer.hides_files and mounts.closed_folders():
        return (
            f"the interpreter must not run as root, and here no other user can load Python from {mounts.closed_folders()}, "
            "nor does the system allow mounts: run the training as another user, or use a Python that everyone may read"
        )
    if not offer.gives_up_rights:
        return (
            "the interpreter must not run as root, and here root cannot become another user (a user namespace with few users?): "
            "run the training as another user"
        )
    missing = offer.missing()
    if not missing:
        return None
    what = f"the interpreter's sandbox does not cover here: {'; '.join(missing)}"
    if not allows_weak:
        return f"{what}: run where user namespaces are allowed, or set allow_weak_sandbox: true (--allow-weak-sandbox)"
    sys.stderr.write(f"{what}, and allow_weak_sandbox is set\n")
    return None


def main() -> None:
    """Serves until stdin is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time-limit-s", type=float, default=5.0)
    parser.add_argument("--memory-mb", type=int, default=Limits.memory_mb)
    parser.add_argument("--file-mb", type=int, default=Limits.file_mb)
    parser.add_argument("--max-output-chars", type=int, default=4000)
    parser.add_argument("--allow-weak-sandbox", action="store_true")
    given = parser.parse_args()
    offer = sandbox.find_offer()
    refusal = refusal_of(offer, given.allow_weak_sandbox)
    if refusal is not None:
        sys.exit(refusal)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a session has two
    limits = Limits(memory_mb=given.memory_mb, file_mb=given.file_mb)
    make_server(Interpreters(limits, given.time_limit_s, given.max_output_chars, offer)).run(show_banner=False)


if __name__ == "__main__":
    main()
