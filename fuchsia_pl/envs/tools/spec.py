"""The nouns of tools: what the policy is told, what it calls, what comes back, and who runs it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from fuchsia_pl.types import ConfigError

# What a rollout counts for each call, beside how the call ended.
TOOL_CALLS = "tool_calls"


class ToolServerError(RuntimeError):
    """A server of tools did not start, or died more often than it may be restarted. The message holds its last words."""


class ToolServerStartError(ToolServerError, ConfigError):
    """A server of tools did not start at the start of a run: its command or URL is wrong, or something is missing here."""


def _each_name(_: Any, properties: Any, __: Any, ___: Any) -> Iterator[ValidationError]:
    for name in properties:
        yield ValidationError(name)


def _every_branch(validator: Any, branches: Any, instance: Any, _: Any) -> Iterator[ValidationError]:
    for branch in branches:
        yield from validator.descend(instance, branch)


# A walk along a schema by jsonschema's own rules for references, whose "errors" are the names of properties.
_NAMES = extend(
    Draft202012Validator,
    {"properties": _each_name, "anyOf": _every_branch, "oneOf": _every_branch, "allOf": _every_branch},
)


@dataclass(frozen=True)
class ToolSpec:
    """What the policy is told of a tool.

    Attributes:
        name: What the policy calls it by.
        description: What it does.
        parameters: JSON schema of its arguments.

    >>> ToolSpec("add", "Adds.", {"type": "object"}).for_template()["function"]["name"]
    'add'
    """

    name: str
    description: str
    parameters: Mapping[str, Any]

    def for_template(self) -> dict[str, Any]:
        """The form that chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def argument_names(self) -> list[str]:
        """Names of the arguments that the schema has, in itself or behind a reference or a choice.

        >>> ToolSpec("f", "", {"anyOf": [{"$ref": "#/$defs/b"}, {}], "$defs": {"b": {"properties": {"x": {}}}}}).argument_names()
        ['x']
        """
        names: set[str] = set()
        # A reference that leads nowhere or to itself is told when the arguments are checked: no argument fits it.
        with contextlib.suppress(Exception):
            for error in _NAMES(dict(self.parameters)).iter_errors({}):
                names |= {error.message} if error.validator == "properties" else set()
        return sorted(names)


@dataclass(frozen=True)
class ToolCall:
    """One call that the policy wrote.

    Attributes:
        name: Of the tool, "" where the call cannot be read.
        arguments: By name.
        error: What is wrong with the call, for the policy to read; None where it is well-formed.

    >>> ToolCall("add", {"a": 1}, None).name
    'add'
    """

    name: str
    arguments: dict[str, Any]
    error: str | None


class ToolStatus(StrEnum):
    """How a tool call ended. Each is counted as `tool_<status>`."""

    OK = "ok"
    ERROR = "error"
    INVALID_CALL = "invalid_call"
    TIMEOUT = "timeout"
    KILLED = "killed"
    OUTPUT_LIMIT = "output_limit"
    SERVER_DIED = "server_died"


@dataclass(frozen=True)
class ToolResult:
    r"""What a call gave. Half a surrogate pair in its text, which no tokenizer and no file takes, is written out.

    >>> ToolResult("3", ToolStatus.OK).status.value
    'ok'
    >>> ToolResult("a\ud800", ToolStatus.OK).text
    'a\\ud800'
    """

    text: str
    status: ToolStatus

    def __post_init__(self) -> None:
        """Makes the text encodable: it came from another process, or from a function that a policy called."""
        object.__setattr__(self, "text", self.text.encode(errors="backslashreplace").decode())


@dataclass(frozen=True)
class MCPServer:
    """A server of tools, as an environment names it: a command that speaks MCP over stdin and stdout, or a URL.

    Every call carries the rollout's key in its `_meta`, by which a server can keep the state of rollouts apart (and may name
    the status of its result there). For a server that keeps state but knows nothing of such keys, set `per_rollout`.

    Attributes:
        command: Program and arguments. It inherits PATH, HOME and the like, and no other variable of this process.
        url: Of a server that runs already.
        env: Variables for the command.
        tools: Names of the tools that the policy may call, None for all.
        end_session_tool: A tool without arguments that forgets a rollout's state; called when one ends, hidden from the policy.
        per_rollout: Gives each rollout that calls a tool a connection of its own; with a command that is a process each.
        start_timeout_s: Bound of a start and of each health check.
        call_timeout_s: Bound of a call.
        max_restarts: How often a server that died is started again during a run.
        max_result_chars: What the policy reads of a result; the middle of a longer one is left out.

    >>> MCPServer(command=["python", "server.py"]).name
    'python server.py'
    """

    command: Sequence[str] | None = None
    url: str | None = None
    env: Mapping[str, str] | None = None
    tools: Sequence[str] | None = None
    end_session_tool: str | None = None
    per_rollout: bool = False
    start_timeout_s: float = 60.0
    call_timeout_s: float = 30.0
    max_restarts: int = 3
    max_result_chars: int = 4000

    def __post_init__(self) -> None:
        """Refuses what could not be started or would never end."""
        if (self.command is None) == (self.url is None):
            raise ConfigError(f"an MCPServer takes either a command or a url, got {self.command!r} and {self.url!r}")
        if self.command is not None and (isinstance(self.command, str) or not self.command):
            raise ConfigError(f"MCPServer.command is a list of words, got {self.command!r}")
        bounds = {
            "start_timeout_s": self.start_timeout_s,
            "call_timeout_s": self.call_timeout_s,
            "max_result_chars": self.max_result_chars,
        }
        for name, value in bounds.items():
            if value <= 0:
                raise ConfigError(f"MCPServer.{name} must be above 0, got {value}")
        if self.max_restarts < 0:
            raise ConfigError(f"MCPServer.max_restarts must be 0 or more, got {self.max_restarts}")

    @property
    def name(self) -> str:
        """For messages."""
        return self.url or " ".join(self.command or ())
