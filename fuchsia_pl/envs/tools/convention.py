"""How a model writes tool calls and reads their results.

A model whose chat template knows tools is taken at its word: `Chat` renders a call through the template and finds out what
stands around it. Every other model gets the plain convention, explained in its system message:

    <tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>
    <tool_response>3</tool_response>
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fuchsia_pl.envs.tools.spec import ToolCall, ToolSpec

# What a model may write in one call, and how deep; Python's own JSON reader fails with a RecursionError far beyond that.
MAX_CALL_CHARS = 100_000


@dataclass(frozen=True)
class ToolConvention:
    """How calls are written, and whose message their results are.

    Attributes:
        opening: What stands before a call's JSON, "" where a turn that calls is nothing but JSON.
        closing: What stands after it.
        arguments_key: The key of the arguments in that JSON; the name's is "name".
        role: The role of a result in the chat template.
        is_native: Whether the chat template itself renders the tools.

    >>> PLAIN.parse('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    [ToolCall(name='add', arguments={'a': 1}, error=None)]
    >>> PLAIN.parse("It is 3.")
    []
    """

    opening: str
    closing: str
    arguments_key: str
    role: str
    is_native: bool

    @property
    def stop(self) -> list[str]:
        """Strings after which the policy waits for a result. A template with tools ends the turn by itself."""
        return [] if self.is_native else [self.closing]

    def parse(self, text: str) -> list[ToolCall]:
        """The calls in a turn's text, special tokens included, in order. A call that cannot be read has an `error`."""
        if not self.opening:
            stripped = text.strip()
            is_call = stripped.startswith(("{", "[")) and '"name"' in stripped
            return self._read(stripped) if is_call else []
        calls: list[ToolCall] = []
        for piece in text.split(self.opening)[1:]:
            body, closed, _ = piece.partition(self.closing) if self.closing else (piece, True, "")
            calls += self._read(body) if closed else [_unreadable(f"it does not end in {self.closing}")]
        return calls

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """A call as a policy writes it.

        >>> PLAIN.call("add", {"a": 1})
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
        """
        return f"{self.opening}{json.dumps({'name': name, self.arguments_key: arguments})}{self.closing}"

    def result(self, text: str) -> str:
        """The message that tells the policy a result."""
        return text if self.is_native else f"<tool_response>{text}</tool_response>"

    def _read(self, body: str) -> list[ToolCall]:
        if len(body) > MAX_CALL_CHARS:
            return [_unreadable(f"it has {len(body)} characters, {MAX_CALL_CHARS} are allowed")]
        try:
            found = json.loads(body)
            json.dumps(
                found, ensure_ascii=False
            ).encode()  # JSON can spell half a surrogate pair, which no tool can be sent
        except ValueError as error:
            return [_unreadable(f"it is not JSON of Unicode text ({error})")]
        except RecursionError:
            return [_unreadable("its JSON is nested too deeply")]
        return [self._call(entry) for entry in (found if isinstance(found, list) else [found])]

    def _call(self, entry: Any) -> ToolCall:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            return _unreadable('it is no JSON object with a "name"')
        arguments = entry.get(self.arguments_key, {})
        if not isinstance(arguments, dict):
            return _unreadable(f'its "{self.arguments_key}" are no JSON object')
        return ToolCall(entry["name"], arguments, None)


PLAIN = ToolConvention("<tool_call>", "</tool_call>", "arguments", role="user", is_native=False)


def instructions(tools: Sequence[ToolSpec]) -> str:
    """What the plain convention says to the policy in its system message."""
    described = "\n".join(json.dumps(tool.for_template()["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You may call these tools:\n{described}\n"
        'To call one, write <tool_call>{"name": …, "arguments": {…}}</tool_call> and wait: its result comes in '
        "<tool_response></tool_response>."
    )


def _unreadable(why: str) -> ToolCall:
    return ToolCall("", {}, f"the call cannot be read: {why}")
