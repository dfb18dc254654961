"""An environment with tools that the policy may call."""

import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator

from fuchsia_pl.envs.base import MultiTurnEnvironment
from fuchsia_pl.envs.tools.spec import TOOL_CALLS, MCPServer, ToolCall, ToolResult, ToolSpec, ToolStatus
from fuchsia_pl.types import ConfigError, Rollout, RolloutStatus

if TYPE_CHECKING:
    from fuchsia_pl.envs.tools.mcp import ToolServer

SLACK_S = 15.0  # extra seconds for a connection beyond its own time limits
SESSION = "tool_session"  # key in `Rollout.state`: the id of the rollout's session at the servers


class ToolEnvironment(MultiTurnEnvironment):
    """A conversation in which the policy calls tools until it writes a turn without a call, which is its answer.

    The tools are those of the MCP `servers` and the Python `functions`. The chat template describes them to the policy if it
    supports tools, else the plain `<tool_call>` convention is used. A call that is malformed, fails or exceeds its time limit
    becomes a text that the policy reads, and is counted. Only the death of a server ends a rollout, as a `tool_error`.

    Attributes:
        servers: MCP servers; this environment starts, checks, restarts and stops them.
        functions: Python functions that run in this process, sync or async; annotations and docstrings describe them to the
            policy. They must handle any arguments that a policy may send.
        function_timeout_s: Time limit in seconds of a call of such a function.
        max_calls_per_turn: Maximum number of calls in one turn; further calls are refused. Calls of a turn run sequentially.
    """

    servers: Sequence[MCPServer] = ()
    functions: Sequence[Callable[..., Any]] = ()
    function_timeout_s = 30.0
    max_calls_per_turn = 4
    _running: "Sequence[ToolServer]" = ()
    _server_of: "dict[str, ToolServer] | None" = None

    @property
    def step_timeout_s(self) -> float:
        """The time limit of the slowest server for the calls of a turn, including a restart."""
        limits = [server.call_timeout_s + server.start_timeout_s for server in self._configs()]
        return self.timeout_s + self.max_calls_per_turn * (max(limits, default=0.0) + SLACK_S)

    @property
    def prepare_timeout_s(self) -> float:
        """Adds the time limits of all servers for a health check, a stop, a start and a list of tools."""
        return super().prepare_timeout_s + sum(3 * server.start_timeout_s + SLACK_S for server in self._configs())

    def counter_names(self) -> list[str]:
        """Adds the counters of calls by outcome."""
        return [*super().counter_names(), TOOL_CALLS, *(f"tool_{status}" for status in ToolStatus)]

    async def prepare(self) -> None:
        """Starts or checks the servers and reads their lists of tools.

        Raises:
            ConfigError: There is no tool, or two have the same name.
            ToolServerError: A server does not start, or has died too often.
        """
        from fuchsia_pl.envs.tools.mcp import ToolServer, serve_functions  # fastmcp is imported only if it is used

        if not self._running:
            functions = serve_functions(self.functions, self.function_timeout_s) if self.functions else None
            in_process = [None] * len(self.servers) + ([functions] if functions is not None else [])
            self._running = [
                ToolServer(config, server) for config, server in zip(self._configs(), in_process, strict=True)
            ]
        server_of: dict[str, ToolServer] = {}
        specs = []
        for server in self._running:
            for spec in await server.ensure_running():
                if spec.name in server_of:
                    raise ConfigError(
                        f"{type(self).__name__} has two tools named {spec.name!r}: choose with MCPServer.tools"
                    )
                server_of[spec.name] = server
                specs.append(spec)
        if not specs:
            raise ConfigError(
                f"{type(self).__name__} has no tools: set self.servers or self.functions in its constructor"
            )
        self.tools, self._server_of = specs, server_of

    async def close(self) -> None:
        """Stops the servers."""
        running, self._running = self._running, ()
        for server in running:
            await server.stop()
        await super().close()

    async def open_rollout(self, rollout: Rollout) -> None:
        """Gives the rollout its own session. The key is always new, so that no rollout finds the state of another."""
        rollout.state[SESSION] = uuid.uuid4().hex

    async def close_rollout(self, rollout: Rollout) -> None:
        """Closes the rollout's sessions at the servers that it called."""
        if rollout.counts[TOOL_CALLS]:
            for server in self._running:
                await server.end_session(rollout.state[SESSION])

    async def step_rollout(self, rollout: Rollout) -> None:
        """Runs the calls of the newest turn and responds with their results; a turn without a call is the last."""
        calls = self.tool_convention.read(rollout.turns[-1].raw_answer, self.tools).calls
        if not calls:
            rollout.finish()
            return
        await self.make_calls(rollout, calls)

    async def make_calls(self, rollout: Rollout, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Runs the calls of the newest turn one after another, counts them, and responds with their results.

        The death of a server ends the rollout; the calls after it are not made.

        Args:
            rollout: The calling rollout.
            calls: The calls.
        """
        results = []
        for position, call in enumerate(calls):
            result = await self.call_tool(rollout, call, is_surplus=position >= self.max_calls_per_turn)
            results.append(result)
            rollout.counts[TOOL_CALLS] += 1
            rollout.counts[f"tool_{result.status}"] += 1
            rollout.respond(self.tool_convention.result(result.text), role=self.tool_convention.role)
            if result.status is ToolStatus.SERVER_DIED:
                rollout.finish(RolloutStatus.TOOL_ERROR)
                break
        return results

    async def call_tool(self, rollout: Rollout, call: ToolCall, is_surplus: bool = False) -> ToolResult:
        """Runs one call. An error becomes the result of the call.

        Args:
            rollout: The calling rollout.
            call: The call.
            is_surplus: Whether the turn has used up its calls.
        """
        assert self._server_of is not None, "prepare comes first"
        server = self._server_of.get(call.name)
        error = call.error
        if error is None and server is None:
            error = f"there is no tool {call.name[:100]!r}, the tools are {sorted(self._server_of)}"
        elif error is None:
            (spec,) = (spec for spec in self.tools if spec.name == call.name)
            error = _misfit(spec, call.arguments)
        if error is None and is_surplus:
            error = f"{self.max_calls_per_turn} calls per turn are allowed"
        if error is not None or server is None:
            return ToolResult(f"Error: {error}", ToolStatus.INVALID_CALL)
        return await server.call(rollout.state[SESSION], call.name, call.arguments)

    def _configs(self) -> list[MCPServer]:
        # Functions have no command; the required URL is not used.
        functions = MCPServer(url="functions of this process", call_timeout_s=self.function_timeout_s)
        return [*self.servers, *([functions] if self.functions else [])]


def _misfit(spec: ToolSpec, arguments: dict[str, Any]) -> str | None:
    """Describes why a call's arguments violate the tool's schema; None if they do not."""
    try:
        problem = next(Draft202012Validator(dict(spec.parameters)).iter_errors(arguments), None)
    except Exception as error:  # validation may fail on hostile arguments: a pattern, a reference, a recursion
        return (
            f"its arguments cannot be checked by the schema of {spec.name}: {type(error).__name__}: {str(error)[:300]}"
        )
    return None if problem is None else f"its arguments do not fit {spec.name}: {problem.message[:300]}"
