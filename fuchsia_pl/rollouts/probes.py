"""Properties of a chat template, found by rendering small conversations instead of from a list of model names."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from fuchsia_pl.envs.tools.convention import ToolConvention
from fuchsia_pl.envs.tools.spec import ToolSpec
from fuchsia_pl.types import ConfigError, Message

# (messages, add_generation_prompt, tools) -> text
Render = Callable[[list[dict[str, Any]], bool, Sequence[ToolSpec]], str]

# Placeholder of the policy's turn. Letters only, so that no template trims, escapes or splits it.
TURN = "fuchsiaturnplaceholder"
# Errors of templates on unknown roles or fields.
TEMPLATE_ERRORS = (TemplateError, TypeError, KeyError, ValueError)
CALL_ID = "callabcde"  # nine letters and digits, which some templates require
QUESTION = {"role": "user", "content": "a"}


def after_turn(render: Render, messages: list[Message], responses: list[Message], tools: Sequence[ToolSpec]) -> str:
    """The template's text after the policy's turn: its end, the responses, and the header of the next turn.

    Args:
        render: The template.
        messages: The conversation before the policy's turn.
        responses: The messages after it.
        tools: The tools of the prompt.

    Raises:
        ConfigError: The template cannot render the exchange, or does not show the policy's turn exactly once.
    """
    turn = TURN
    while any(turn in message["content"] for message in [*messages, *responses]):
        turn += "x"
    exchange = [*messages, {"role": "assistant", "content": turn}, *responses]
    try:
        text = render(exchange, True, tools)
    except TEMPLATE_ERRORS as error:
        raise ConfigError(
            f"the model's chat template cannot render a response with the roles {[m['role'] for m in responses]} ({error}): call "
            'rollout.respond(text, role=…) with a role that it has, mostly "user", once a turn, or use another model'
        ) from error
    _, found, after = text.partition(turn)
    if not found or turn in after:
        raise ConfigError(
            "the model's chat template does not show an earlier turn of the policy exactly once, so no further turn can be put "
            "after it: use a single-turn environment, or another model"
        )
    return after


def turn_edges(render: Render) -> tuple[str, list[str]]:
    """The template's text before a first question, and after turns: the policy's last turn and a user's message.

    The first token after a turn ends the turn. In some templates there is no such token, and the next header follows directly.
    """
    question, answer = {"role": "user", "content": TURN}, {"role": "assistant", "content": TURN}
    header, endings = "", []
    for messages, adds_header in (([QUESTION, answer], False), ([question], True)):
        try:
            header, _, ending = render(messages, adds_header, ()).rpartition(TURN)
        except TEMPLATE_ERRORS:
            continue
        endings.append(ending)
    return header, endings


def rewrites_earlier_turns(render: Render) -> bool:
    """Whether the template changes a turn with thinking after another turn follows."""
    thought = "<think>\nhm\n</think>\n\nyes"
    first = render([QUESTION], True, ())
    try:
        later = render([QUESTION, {"role": "assistant", "content": thought}, {**QUESTION, "content": "b"}], True, ())
    except TEMPLATE_ERRORS:
        return True
    return not later.startswith(first + thought)


def native_convention(render: Render, tools: Sequence[ToolSpec]) -> ToolConvention | None:
    """Format of the template's tool calls, None if it does not support tools or does not write calls as JSON.

    The template must list the tools, show a call of the policy, and show a message of the role "tool".
    """
    if not tools:
        return None
    function = {"name": tools[0].name, "arguments": {"argument": TURN}}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": CALL_ID, "type": "function", "function": function}],
    }
    answer = {"role": "tool", "content": TURN}
    try:
        with_tools, without_tools = render([QUESTION], True, tools), render([QUESTION], True, ())
        shown = render([QUESTION, call], False, tools)
        plain = render([QUESTION, {"role": "assistant", "content": TURN}], False, tools)
        answered = render([QUESTION, {"role": "assistant", "content": "b"}, answer], True, tools)
    except TEMPLATE_ERRORS:
        return None
    if with_tools == without_tools or not all(tool.name in with_tools for tool in tools) or TURN not in answered:
        return None
    end_of_turn = plain.partition(TURN)[2]
    return _around_the_call(shown.removeprefix(with_tools).removesuffix(end_of_turn), tools[0].name)


def _around_the_call(turn: str, name: str) -> ToolConvention | None:
    """Parses a rendered turn that consists of one call with one argument."""
    call = re.search(
        rf'\{{\s*"name"\s*:\s*"{re.escape(name)}"\s*,\s*"(arguments|parameters)"\s*:\s*'
        rf'\{{\s*"argument"\s*:\s*"{TURN}"\s*\}}[^{{}}]*\}}',
        turn,
    )
    if call is None:
        return None
    # Some templates put an empty thought before the call, on separate lines. Some write a list of calls.
    before = turn[: call.start()].strip().removesuffix("[").strip().splitlines()
    closing = turn[call.end() :].strip().removeprefix("]").strip()
    return ToolConvention(before[-1] if before else "", closing, call.group(1), role="tool", is_native=True)


def with_call_id(message: dict[str, Any]) -> dict[str, Any]:
    """A tool's message with the fields that templates require; any other message unchanged."""
    return {**message, "tool_call_id": CALL_ID, "name": "tool"} if message["role"] == "tool" else message
