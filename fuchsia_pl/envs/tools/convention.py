"""How a model writes tool calls and reads their results.

A model whose chat template knows tools is taken at its word: `Chat` renders a call through the template and finds out what
stands around it. Every other model gets the plain convention, explained in its system message:

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
    """How calls are written, and whose message their results are.

    Attributes:
        opening: What stands before a call's JSON, "" where calls are JSON without tags, anywhere in a turn.
        closing: What stands after it.
        arguments_key: The key of the arguments in that JSON as the template writes it; the name's is "name".
        role: The role of a result in the chat template.
        is_native: Whether the chat template itself renders the tools.

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
        """Strings after which the policy waits for a result. A template with tools ends the turn by itself."""
        return [] if self.is_native else [self.closing]

    def read(self, text: str, tools: Sequence[ToolSpec]) -> TurnCalls:
        """Finds the calls in a turn's text. A call that cannot be read has an `error`.

        Args:
            text: The turn with its special tokens and without its thinking.
            tools: What the policy may call: without tags, JSON is a call only where it names one of these or has arguments.
        """
        if not self.opening:
            return read_bare(text, tools)
        return read_tagged(text, self.opening, self.closing, tools)

    def opaque(self, tools: Sequence[ToolSpec]) -> Opaque:
        """The JSON of calls, in whose strings marks of thinking are text.

        Args:
            tools: What the policy may call.

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
        """A call as a policy writes it.

        >>> PLAIN.call("add", {"a": 1})
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
        """
        return f"{self.opening}{json.dumps({'name': name, self.arguments_key: arguments})}{self.closing}"

    def result(self, text: str) -> str:
        """The message that tells the policy a result."""
        return text if self.is_native else f"<tool_response>{text}</tool_response>"


PLAIN = ToolConvention("<tool_call>", "</tool_call>", "arguments", role="user", is_native=False)


def instructions(tools: Sequence[ToolSpec]) -> str:
    """What the plain convention says to the policy in its system message."""
    described = "\n".join(json.dumps(tool.for_template()["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You may call these tools:\n{described}\n"
        'To call one, write <tool_call>{"name": …, "arguments": {…}}</tool_call> and wait: its result comes in '
        "<tool_response></tool_response>."
    )
