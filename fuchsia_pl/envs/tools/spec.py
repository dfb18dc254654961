"""Data types of tools: descriptions, calls, results and servers."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from fuchsia_pl.types import ConfigError

# Counter of all calls in `Rollout.counts`, besides one counter per status.
TOOL_CALLS = "tool_calls"


class ToolServerError(RuntimeError):
    """A tool server did not start, or died more often than it may be restarted. The message contains the end of its log."""


class ToolServerStartError(ToolServerError, ConfigError):
    """A tool server did not start at the start of a run: its command or URL is wrong, or a dependency is missing."""


def _each_name(_: Any, properties: Any, __: Any, ___: Any) -> Iterator[ValidationError]:
    for name in properties:
        yield ValidationError(name)


def _every_branch(validator: Any, branches: Any, instance: Any, _: Any) -> Iterator[ValidationError]:
    for branch in branches:
        yield from validator.descend(instance, branch)


# Traverses a schema by jsonschema's rules for references. Its "errors" are the names of properties.
_NAMES = extend(
    Draft202012Validator,
    {"properties": _each_name, "anyOf": _every_branch, "oneOf": _every_branch, "allOf": _every_branch},
)


@dataclass(frozen=True)
class ToolSpec:
    """Description of a tool for the policy.

    Attributes:
        name: Name of the tool in calls.
        description: Purpose of the tool.
        parameters: JSON schema of its arguments.

    >>> ToolSpec("add", "Adds.", {"type": "object"}).for_template()["function"]["name"]
    'add'
    """

    name: str
    description: str
    parameters: Mapping[str, Any]

    def for_template(self) -> dict[str, Any]:
        """The form that chat templates accept."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def argument_names(self) -> list[str]:
        """Names of the arguments in the schema, including those behind references and choices.

        >>> ToolSpec("f", "", {"anyOf": [{"$ref": "#/$defs/b"}, {}], "$defs": {"b": {"properties": {"x": {}}}}}).argument_names()
        ['x']
        """
        names: set[str] = set()
        # A dangling or circular reference is reported when arguments are checked: no arguments match it.
        with contextlib.suppress(Exception):
            for error in _NAMES(dict(self.parameters)).iter_errors({}):
                names |= {error.message} if error.validator == "properties" else set()
        return sorted(names)


@dataclass(frozen=True)
class ToolCall:
    """One call written by the policy.

    Attributes:
        name: Name of the tool; "" if the call cannot be read.
        arguments: Arguments by name.
        error: Description of the fault, which the policy reads; None if the call is well-formed.

    >>> ToolCall("add", {"a": 1}, None).name
    'add'
    """

    name: str
    arguments: dict[str, Any]
    error: str | None


class ToolStatus(StrEnum):
    """Outcome of a tool call. Each is counted as `tool_<status>`."""

    OK = "ok"
    ERROR = "error"
    INVALID_CALL = "invalid_call"
    TIMEOUT = "timeout"
    KILLED = "killed"
    OUTPUT_LIMIT = "output_limit"
    SERVER_DIED = "server_died"


@dataclass(frozen=True)
class ToolResult:
    r"""Result of a call. Half of a surrogate pair in its text, which no tokenizer and no file accepts, is escaped.

    >>> ToolResult("3", ToolStatus.OK).status.value
    'ok'
    >>> ToolResult("a\ud800", ToolStatus.OK).text
    'a\\ud800'
    """

    text: str
    status: ToolStatus

    def __post_init__(self) -> None:
        """Makes the text encodable: its origin is another process, or a function that a policy called."""
        object.__setattr__(self, "text", self.text.encode(errors="backslashreplace").decode())


@dataclass(frozen=True)
class MCPServer:
    """Configuration of a tool server: a command that serves MCP over stdin and stdout, or a URL.

    Each call contains the rollout's key in its `_meta`, with which a server can separate the state of rollouts; the `_meta` of
    the result may contain its status. For a server that keeps state but does not use this key, set `per_rollout`.

    Attributes:
        command: Program and arguments. It inherits PATH, HOME and similar variables, and no others of this process.
        url: URL of a running server.
        env: Environment variables of the command.
        tools: Names of the tools that the policy may call; None for all.
        end_session_tool: Tool without arguments that clears a rollout's state. It is called at the end of a rollout and hidden
            from the policy.
        per_rollout: Opens a separate connection for each rollout that calls a tool; with a command, a separate process.
        start_timeout_s: Time limit in seconds of a start and of each health check.
        call_timeout_s: Time limit in seconds of a call.
        max_restarts: Maximum number of restarts of the server during a run.
        max_result_chars: Maximum number of characters of a result that the policy reads. The middle of a longer one is omitted.

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
        """Rejects settings with which the server could not start or a call would never end."""
        if (self.command is None) == (self.url is None):
            raise ConfigError(f"an MCPServer takes either a command or a url, got {self.command!r} and {self.url!r}")
        if self.command is not None and (isinstance(self.command, str) or not self.command):
            raise ConfigError(f"MCPServer.command must be a list of words, got {self.command!r}")
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
        """Name of the server in messages."""
        return self.url or " ".join(self.command or ())
