"""MCP servers of tools, over fastmcp: started, health-checked, restarted a bounded number of times, and stopped."""

import asyncio
import contextlib
import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

from fastmcp import Client, FastMCP
from fastmcp.client.transports import StdioTransport
from fastmcp.tools import FunctionTool
from mcp.shared.exceptions import MCPError
from mcp_types import REQUEST_TIMEOUT
from pydantic import ValidationError

from fuchsia_pl.envs.bounded import call_in_thread
from fuchsia_pl.envs.tools.reading import unsendable
from fuchsia_pl.envs.tools.spec import (
    MCPServer,
    ToolResult,
    ToolServerError,
    ToolServerStartError,
    ToolSpec,
    ToolStatus,
)
from fuchsia_pl.envs.user_code import contained
from fuchsia_pl.scratch import OWNER_VARIABLE, scratch_file
from fuchsia_pl.types import ConfigError, shortened

# The keys of a request's and a result's `_meta` that a server may read and write.
ROLLOUT_KEY = "fuchsia/rollout"
STATUS_KEY = "fuchsia/status"
# The client's own bound comes after the one it gives to the protocol, in case the protocol's never fires.
GRACE_S = 5.0
LOG_TAIL_CHARS = 2000
MAX_ERROR_CHARS = 500
SCRIPT_SUFFIXES = (".cjs", ".jar", ".js", ".mjs", ".py", ".sh", ".ts")


class ToolServer:
    """The running side of an `MCPServer`. All coroutines belong to one event loop.

    Args:
        config: The server.
        in_process: Tools of this process, in place of what the config names.
    """

    def __init__(self, config: MCPServer, in_process: FastMCP | None = None) -> None:
        self.config = config
        self.num_starts = 0
        self._in_process = in_process
        self._client: Client[Any] | None = None
        self._own: dict[str, Client[Any]] = {}  # with `per_rollout`
        self._first_start: dict[str, int] = {}  # which start of the server holds a rollout's state
        self._specs: list[ToolSpec] = []
        self._lock = asyncio.Lock()
        self._log = scratch_file("tools", ".log")

    @property
    def keeps_state(self) -> bool:
        """Whether a rollout has lost something when the server was restarted."""
        return self.config.per_rollout or self.config.end_session_tool is not None

    async def ensure_running(self) -> list[ToolSpec]:
        """Starts the server, or asks one that runs whether it answers and restarts it if not; returns its tools.

        Raises:
            ToolServerError: It does not start, or has died too often.
        """
        async with self._lock:
            if self._specs and (self.config.per_rollout or await self._answers(self._client)):
                return self._specs
            await self._drop()
            if self.num_starts > self.config.max_restarts:
                died = f"died {self.num_starts} times, and max_restarts allows {self.config.max_restarts} restarts"
                raise ToolServerError(self._words(f"the tool server {self.config.name!r} {died}"))
            self._client = await self._connect()
            self.num_starts += 1
            self._specs = await self._list_tools(self._client)
            if self.config.per_rollout:
                await self._drop()
        return self._specs

    async def call(self, key: str, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Calls a tool on behalf of a rollout.

        Args:
            key: The rollout's, the same in all of its calls.
            name: The tool.
            arguments: By name.

        Returns:
            The result, or what went wrong in its place: the call could not be sent, was refused or took too long, or the
            server died. Only the last costs the server, and with it what other rollouts have in flight there.

        Raises:
            ToolServerError: The server cannot be started again.
        """
        problem = unsendable(arguments)
        if problem is not None:  # what breaks in the transport's own tasks would break the connection
            return ToolResult(f"Error: the call cannot be sent: {problem}", ToolStatus.INVALID_CALL)
        client = await self._client_for(key)
        if client is None:
            return ToolResult("The tool's state was lost: its server has died.", ToolStatus.SERVER_DIED)
        limit = self.config.call_timeout_s
        try:
            async with asyncio.timeout(limit + GRACE_S):
                result = await client.call_tool(
                    name, arguments, timeout=limit, raise_on_error=False, meta={ROLLOUT_KEY: key}
                )
        except TimeoutError:
            return _timed_out(limit)
        except Exception as error:  # calls fail in many ways; only the server itself can tell whether it lives
            if isinstance(error, MCPError) and error.code == REQUEST_TIMEOUT:
                return _timed_out(limit)
            return _failed(error) if await self._answers(client) else await self._after_loss(client, error)
        return self._shown(result)

    async def end_session(self, key: str) -> None:
        """Forgets a rollout: its connection, or its state in the server. A server that is dead has forgotten it already."""
        self._first_start.pop(key, None)
        own = self._own.pop(key, None)
        if own is not None:
            await _close(own)
        elif self.config.end_session_tool is not None and self._client is not None:
            # Whatever goes wrong here is found by the next health check.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(self.config.call_timeout_s):
                    await self._client.call_tool(self.config.end_session_tool, {}, meta={ROLLOUT_KEY: key})

    async def stop(self) -> None:
        """Ends every connection, and with it the processes of commands."""
        async with self._lock:
            await asyncio.gather(self._drop(), *(_close(client) for client in self._own.values()))
            self._own.clear()
            self._specs = []
            self._log.unlink(missing_ok=True)

    async def _client_for(self, key: str) -> "Client[Any] | None":
        """The connection of a rollout, None where its state is lost."""
        if self.config.per_rollout:
            if key not in self._own:
                if key in self._first_start:
                    return None
                self._first_start[key] = self.num_starts
                self._own[key] = await self._connect()
            return self._own[key]
        if self._client is None:
            await self.ensure_running()
        if self._first_start.setdefault(key, self.num_starts) != self.num_starts and self.keeps_state:
            return None
        return self._client

    async def _after_loss(self, client: "Client[Any]", error: Exception) -> ToolResult:
        """Drops a connection that broke."""
        if client is self._client:
            self._client = None
        for key in [key for key, own in self._own.items() if own is client]:
            del self._own[key]
        await _close(client)
        return ToolResult(f"The tool's server has died ({error}).", ToolStatus.SERVER_DIED)

    async def _answers(self, client: "Client[Any] | None") -> bool:
        if client is None:
            return False
        try:
            async with asyncio.timeout(self.config.start_timeout_s):
                await client.list_tools()
        except Exception:  # no answer is an answer: the server is restarted, and its death is counted
            return False
        return True

    async def _connect(self) -> "Client[Any]":
        target: Any = self._in_process if self._in_process is not None else self._transport()
        client: Client[Any] = Client(target, init_timeout=self.config.start_timeout_s)
        try:
            async with asyncio.timeout(self.config.start_timeout_s + GRACE_S):
                await client.__aenter__()
        except Exception as error:  # a server fails to start in many ways; each ends the run with its last words
            await _close(client)
            kind = ToolServerError if self.num_starts else ToolServerStartError
            raise kind(f"the tool server {self.config.name!r} did not start{self._why_not(error)}") from error
        return client

    def _why_not(self, error: Exception) -> str:
        missing = missing_part(self.config.command or (), (self.config.env or {}).get("PATH"))
        if missing is not None:
            return f": {missing}"
        return self._words(f" ({type(error).__name__}: {error})")

    def _transport(self) -> StdioTransport | str:
        if self.config.url is not None:
            return self.config.url
        program, *arguments = self.config.command or ()
        # Without its owner's name it would outlive a run that was killed, if it does not look at its input.
        own = {OWNER_VARIABLE: os.environ[OWNER_VARIABLE]} if OWNER_VARIABLE in os.environ else {}
        environment = {**own, **(self.config.env or {})}
        # Kept alive, the process would outlive its client.
        return StdioTransport(program, arguments, environment, keep_alive=False, log_file=self._log)

    async def _list_tools(self, client: "Client[Any]") -> list[ToolSpec]:
        found = {tool.name: tool for tool in await client.list_tools()}
        hidden = {self.config.end_session_tool} if self.config.end_session_tool else set()
        wanted = list(self.config.tools) if self.config.tools is not None else [n for n in found if n not in hidden]
        missing = sorted({*wanted, *hidden} - set(found))
        if missing or not wanted:
            raise ConfigError(f"the tool server {self.config.name!r} has no tools {missing}, it has {sorted(found)}")
        return [ToolSpec(name, found[name].description or "", found[name].input_schema) for name in wanted]

    async def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await _close(client)

    def _shown(self, result: Any) -> ToolResult:
        texts = [block.text if block.type == "text" else f"[{block.type}]" for block in result.content]
        text, limit = "\n".join(texts), self.config.max_result_chars
        named = (result.meta or {}).get(STATUS_KEY)
        status = (
            ToolStatus(named) if named in list(ToolStatus) else ToolStatus.ERROR if result.is_error else ToolStatus.OK
        )
        if len(text) > limit:
            status = ToolStatus.OUTPUT_LIMIT if status is ToolStatus.OK else status
            text = shortened(text, limit)
        return ToolResult(text, status)

    def _words(self, what: str) -> str:
        log = self._log.read_text(errors="replace")[-LOG_TAIL_CHARS:] if self._log.exists() else ""
        return f"{what}. The end of what it said:\n{log}" if log else what


def missing_part(command: Sequence[str], search_path: str | None) -> str | None:
    """What of a command that failed does not exist: its program, or a script that it names. None where both exist.

    Args:
        command: Program and arguments.
        search_path: Folders of programs, None for this process's own.

    >>> missing_part(["no-such-program", "--fast"], None)
    "there is no program 'no-such-program'"
    """
    if not command:
        return None
    program, *arguments = command
    if shutil.which(program, path=search_path) is None:
        return f"there is no program {program!r}"
    scripts = [word for word in arguments if Path(word).suffix in SCRIPT_SUFFIXES and not word.startswith("-")]
    absent = next((script for script in scripts if not Path(script).exists()), None)
    return None if absent is None else f"there is no file {str(Path(absent).absolute())!r}"


def serve_functions(functions: Sequence[Callable[..., Any]], timeout_s: float) -> FastMCP:
    """An MCP server in this process whose tools are Python functions; their annotations and docstrings become schemas.

    Args:
        functions: Sync or async.
        timeout_s: When a call of one is given up.
    """
    server: FastMCP = FastMCP("functions")
    for function in functions:
        server.add_tool(FunctionTool.from_function(_off_the_loop(function, timeout_s)))
    return server


def _off_the_loop(function: Callable[..., Any], timeout_s: float) -> Callable[..., Any]:
    """A coroutine function with the signature of `function`; a sync one runs in a thread that nothing waits for at exit.

    Of what is no plain error, such as SystemExit, the server's own task would die: it becomes one.
    """

    @wraps(function)
    async def tool(**arguments: Any) -> Any:
        if inspect.iscoroutinefunction(function):
            return await contained(function(**arguments))
        return await contained(call_in_thread(partial(function, **arguments), timeout_s=timeout_s))

    return tool


def _timed_out(limit: float) -> ToolResult:
    return ToolResult(f"The tool gave no result within {limit:g} s.", ToolStatus.TIMEOUT)


def _failed(error: Exception) -> ToolResult:
    """A call that failed while its server lives."""
    why = shortened(str(error) or type(error).__name__, MAX_ERROR_CHARS)
    if isinstance(error, MCPError):
        return ToolResult(f"Error: the tool's server refused the call ({why})", ToolStatus.ERROR)
    if isinstance(error, ValidationError):  # a ValueError, but of what came back
        return ToolResult(f"Error: the tool's server sent a malformed reply ({why})", ToolStatus.ERROR)
    if isinstance(error, ValueError | TypeError):  # the client's own words for what it cannot put into a message
        return ToolResult(f"Error: the call cannot be sent ({why})", ToolStatus.INVALID_CALL)
    return ToolResult(f"Error: the call failed ({why})", ToolStatus.ERROR)


async def _close(client: "Client[Any]") -> None:
    # A connection that cannot be closed in order is dead; its process was sent a signal by then.
    with contextlib.suppress(Exception):
        async with asyncio.timeout(GRACE_S):
            await client.close()
