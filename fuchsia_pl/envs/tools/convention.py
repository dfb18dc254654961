"""Formats of tool calls and of their results.

If the chat template of a model supports tools, its format is used: `Chat` renders a call through the template and extracts the
text around it. Every other model uses the plain convention, which the system message explains:

    <tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>
    <tool_response>3</tool_response>
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fuchsia_pl.envs.thinking import Opaque
from fuchsia_pl.envs.tools.reading import TurnCalls, beginning, end_of_json, read_bare, read_tagged
from fuchsia_pl.envs.tools.spec import ToolSpec


@dataclass(frozen=True)
class ToolConvention:
    """Format of calls, and role of the messages with their results.

    Attributes:
        opening: Text before the JSON of a call; "" if calls are JSON without tags, anywhere in a turn.
        closing: Text after the JSON of a call.
        arguments_key: Key of the arguments in the JSON of the template; the key of the name is "name".
        role: Role of a result in the chat template.
        is_native: Whether the chat template renders the tools.

    >>> PLAIN.read('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', tools=[]).calls
    (ToolCall(name='add', arguments={'a': 1}, error=None),)
    >>> PLAIN.read("It is 3.", tools=[]).calls
    ()
    """

    opening: str
    closing: str
    arguments_key: str
    role: str
    is_native: bool

    @property
    def stop(self) -> list[str]:
        """Strings after which a turn ends to wait for a result. A chat template with tools has its own end of a turn."""
        return [] if self.is_native else [self.closing]

    def read(self, text: str, tools: Sequence[ToolSpec]) -> TurnCalls:
        """Finds the calls in the text of a turn. A call that cannot be read has an `error`.

        Args:
            text: Text of the turn with its special tokens and without its thinking.
            tools: Available tools. Without tags, JSON is a call only if it names one of these or has arguments.
        """
        if not self.opening:
            return read_bare(text, tools)
        return read_tagged(text, self.opening, self.closing, tools)

    def opaque(self, tools: Sequence[ToolSpec]) -> Opaque:
        """The JSON of calls: thinking marks in its strings are ordinary text.

        Args:
            tools: Available tools.

        >>> from fuchsia_pl.envs.thinking import without_thinking
        >>> without_thinking('<think>3</think><tool_call>{"name": "</think>"}', opaque=PLAIN.opaque([]))
        '<tool_call>{"name": "</think>"}'
        """
        if not self.opening:
            return Opaque(
                beginning(tools).pattern, lambda match, marks: end_of_json(match.string, match.start(), marks)
            )
        tags = (self.opening, self.closing)
        return Opaque(
            re.escape(self.opening), lambda match, marks: end_of_json(match.string, match.end(), (*marks, *tags))
        )

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """A call in this format.

        >>> PLAIN.call("add", {"a": 1})
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
        """
        return f"{self.opening}{json.dumps({'name': name, self.arguments_key: arguments})}{self.closing}"

    def result(self, text: str) -> str:
        """The message with the result of a call."""
        return text if self.is_native else f"<tool_response>{text}</tool_response>"


PLAIN = ToolConvention("<tool_call>", "</tool_call>", "arguments", role="user", is_native=False)


def instructions(tools: Sequence[ToolSpec]) -> str:
    """Explanation of the plain convention for the system message."""
    described = "\n".join(json.dumps(tool.for_template()["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You may call these tools:\n{described}\n"
        'To call one, write <tool_call>{"name": …, "arguments": {…}}</tool_call> and wait: its result comes in '
        "<tool_response></tool_response>."
    )
