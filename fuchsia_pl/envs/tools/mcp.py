"""MCP servers of tools, through fastmcp: start, health check, a limited number of restarts, and stop."""

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

# Keys in the `_meta` of a request and of a result. A server may read the first and write the second.
ROLLOUT_KEY = "fuchsia/rollout"
STATUS_KEY = "fuchsia/status"
# The client's own time limit is later than that of the protocol, in case that one has no effect.
GRACE_S = 5.0
LOG_TAIL_CHARS = 2000
MAX_ERROR_CHARS = 500
SCRIPT_SUFFIXES = (".cjs", ".jar", ".js", ".mjs", ".py", ".sh", ".ts")


class ToolServer:
    """Client of a server and owner of its process. All coroutines run in one event loop.

    Args:
        config: Configuration of the server.
        in_process: Server in this process, used instead of the configured command or URL.
    """

    def __init__(self, config: MCPServer, in_process: FastMCP | None = None) -> None:
        self.config = config
        self.num_starts = 0
        self._in_process = in_process
        self._client: Client[Any] | None = None
        self._own: dict[str, Client[Any]] = {}  # with `per_rollout`
        self._first_start: dict[str, int] = {}  # number of server starts when a rollout's state was created
        self._specs: list[ToolSpec] = []
        self._lock = asyncio.Lock()
        self._log = scratch_file("tools", ".log")

    @property
    def keeps_state(self) -> bool:
        """Whether a restart of the server loses the state of rollouts."""
        return self.config.per_rollout or self.config.end_session_tool is not None

    async def ensure_running(self) -> list[ToolSpec]:
        """Starts the server, or restarts it if its health check fails; returns its tools.

        Raises:
            ToolServerError: It does not start, or has died too often.
        """
        async with self._lock:
            if self._specs and (self.config.per_rollout or await self._answers(self._client)):
                return self._specs
            await self._drop()
            if self.num_starts > self.config.max_restarts:
                died = f"died {self.num_starts} times, but max_restarts allows {self.config.max_restarts} restarts"
                raise ToolServerError(self._words(f"the tool server {self.config.name!r} {died}"))
            self._client = await self._connect()
            self.num_starts += 1
            self._specs = await self._list_tools(self._client)
            if self.config.per_rollout:
                await self._drop()
        return self._specs

    async def call(self, key: str, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Calls a tool for a rollout.

        Args:
            key: Key of the rollout, the same for all of its calls.
            name: Name of the tool.
            arguments: Arguments by name.

        Returns:
            The result, or a description of the failure: the call could not be sent, was refused or exceeded its time limit, or
            the server died. Only the death of the server also affects the pending calls of other rollouts.

        Raises:
            ToolServerError: The server cannot be restarted.
        """
        problem = unsendable(arguments)
        if problem is not None:  # an error in the transport's own tasks would break the connection
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
        except Exception as error:  # calls fail in many ways; a health check detects whether the server is alive
            if isinstance(error, MCPError) and error.code == REQUEST_TIMEOUT:
                return _timed_out(limit)
            return _failed(error) if await self._answers(client) else await self._after_loss(client, error)
        return self._shown(result)

    async def end_session(self, key: str) -> None:
        """Closes the connection of a rollout, or clears its state in the server. A dead server has no state to clear."""
        self._first_start.pop(key, None)
        own = self._own.pop(key, None)
        if own is not None:
            await _close(own)
        elif self.config.end_session_tool is not None and self._client is not None:
            # The next health check detects a failure.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(self.config.call_timeout_s):
                    await self._client.call_tool(self.config.end_session_tool, {}, meta={ROLLOUT_KEY: key})

    async def stop(self) -> None:
        """Closes every connection, which also ends the processes of commands."""
        async with self._lock:
            await asyncio.gather(self._drop(), *(_close(client) for client in self._own.values()))
            self._own.clear()
            self._specs = []
            self._log.unlink(missing_ok=True)

    async def _client_for(self, key: str) -> "Client[Any] | None":
        """The connection of a rollout; None if its state is lost."""
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
        """Drops a broken connection."""
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
        except Exception:  # any failure counts as a death: the server is restarted
            return False
        return True

    async def _connect(self) -> "Client[Any]":
        target: Any = self._in_process if self._in_process is not None else self._transport()
        client: Client[Any] = Client(target, init_timeout=self.config.start_timeout_s)
        try:
            async with asyncio.timeout(self.config.start_timeout_s + GRACE_S):
                await client.__aenter__()
        except Exception as error:  # starts fail in many ways; each ends the run with the end of the server's log
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
        # The watcher in `orphans.py` ends a server by this variable, if the run is killed and the server ignores its input.
        own = {OWNER_VARIABLE: os.environ[OWNER_VARIABLE]} if OWNER_VARIABLE in os.environ else {}
        environment = {**own, **(self.config.env or {})}
        # With keep_alive=True, the process would outlive its client.
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
        return f"{what}. The end of its log:\n{log}" if log else what


def missing_part(command: Sequence[str], search_path: str | None) -> str | None:
    """The missing part of a command: its program, or a script in its arguments. None if both exist.

    Args:
        command: Program and arguments.
        search_path: Value of PATH for the program; None for that of this process.

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
    """An MCP server in this process for Python functions. Their annotations and docstrings become schemas.

    Args:
        functions: Sync or async functions.
        timeout_s: Seconds after which a call is abandoned.
    """
    server: FastMCP = FastMCP("functions")
    for function in functions:
        server.add_tool(FunctionTool.from_function(_off_the_loop(function, timeout_s)))
    return server


def _off_the_loop(function: Callable[..., Any], timeout_s: float) -> Callable[..., Any]:
    """A coroutine function with the signature of `function`. A sync one runs in a thread that is not joined at exit.

    An exception such as SystemExit would end the server's own task, so it is converted to a plain error.
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
    """The result of a failed call to a server that is alive."""
    why = shortened(str(error) or type(error).__name__, MAX_ERROR_CHARS)
    if isinstance(error, MCPError):
        return ToolResult(f"Error: the tool's server refused the call ({why})", ToolStatus.ERROR)
    if isinstance(error, ValidationError):  # a ValueError too, but about the reply
        return ToolResult(f"Error: the tool's server sent a malformed reply ({why})", ToolStatus.ERROR)
    if isinstance(error, ValueError | TypeError):  # the client cannot serialise the arguments
        return ToolResult(f"Error: the call cannot be sent ({why})", ToolStatus.INVALID_CALL)
    return ToolResult(f"Error: the call failed ({why})", ToolStatus.ERROR)


async def _close(client: "Client[Any]") -> None:
    # If closing fails, the connection is dead and its process has already been sent a signal.
    with contextlib.suppress(Exception):
        async with asyncio.timeout(GRACE_S):
            await client.close()
