"""Messages of verifiers and of ours. The policy reads text only."""

import json
from collections.abc import Sequence

import verifiers.v1 as vf
from verifiers.v1.types import content_text

from fuchsia_pl.envs import ConfigError, Message
from fuchsia_pl.library.verifiers.exchange import Reply
from fuchsia_pl.types import shortened

PROMPT_ROLES = (vf.SystemMessage, vf.UserMessage, vf.AssistantMessage)


def opening_messages(data: vf.TaskData, first: Sequence[vf.Message]) -> list[vf.Message]:
    """The conversation before the policy's first turn.

    Args:
        data: Data of the task, with its system prompt and its prompt.
        first: The messages that open the conversation of a task without a prompt.
    """
    system = [] if data.system_prompt is None else [vf.SystemMessage(content=data.system_prompt)]
    if data.prompt is None:
        return [*system, *first]
    prompt = [vf.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else data.prompt
    return [*system, *prompt]


def as_ours(messages: Sequence[vf.Message]) -> list[Message]:
    """Messages of verifiers as ours.

    Raises:
        ConfigError: A message has an image, a tool call or a tool's result.
    """
    return [{"role": _checked(message).role, "content": text_of(message)} for message in messages]


def _checked(message: vf.Message) -> vf.Message:
    if not isinstance(message, PROMPT_ROLES) or (isinstance(message, vf.AssistantMessage) and message.tool_calls):
        raise ConfigError(
            "the prompt of a task of verifiers has tool calls or their results, and only text is supported"
        )
    return message


def text_of(message: vf.Message) -> str:
    """The text of a message.

    Raises:
        ConfigError: It has an image.
    """
    content = message.content
    if isinstance(content, list) and any(part.type != "text" for part in content):
        raise ConfigError("a message of a task of verifiers has an image, and only text is supported")
    return content_text(content)


def user_messages(message: str | vf.Messages) -> list[vf.UserMessage]:
    """The user messages with which an environment continues, typed.

    Args:
        message: A text, or messages, some of which may be mappings.

    Raises:
        ConfigError: A message is not one of the user.
    """
    given = [vf.UserMessage(content=message)] if isinstance(message, str) else message
    typed = [vf.UserMessage.model_validate(one) if _is_user_mapping(one) else one for one in given]
    for one in typed:
        if not isinstance(one, vf.UserMessage):
            role = one.get("role") if isinstance(one, dict) else one.role
            raise ConfigError(
                f"an environment of verifiers adds a message of the role {role!r}, and only 'user' is supported"
            )
    return typed


def _is_user_mapping(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") == "user"


def as_read(messages: Sequence[vf.UserMessage], max_chars: int) -> list[vf.UserMessage]:
    """Messages as the policy reads them after `rollout.respond`.

    Args:
        messages: The messages.
        max_chars: Largest length of one; the middle of a longer one is left out.
    """
    return [vf.UserMessage(content=shortened(_encodable(text_of(one)), max_chars)) for one in messages]


def written_messages(reply: Reply, number: int) -> tuple[vf.AssistantMessage, list[vf.ToolMessage]]:
    """A turn and the results of its tool calls as messages of verifiers.

    Args:
        reply: The turn.
        number: Number of turns before it. It makes the ids of its calls unique.
    """
    calls = [
        vf.ToolCall(id=f"call_{number}_{position}", name=_encodable(call.name), arguments=json.dumps(call.arguments))
        for position, call in enumerate(reply.calls)
    ]
    results = [
        vf.ToolMessage(tool_call_id=call.id, content=result.text, name=call.name)
        for call, result in zip(calls, reply.results, strict=True)
    ]
    text, thinking = _encodable(reply.text), reply.thinking
    return vf.AssistantMessage(content=text, reasoning_content=thinking, tool_calls=calls or None), results


def _encodable(text: str) -> str:
    """The text with a question mark for half of a surrogate pair, as in `Rollout.respond`."""
    return text.encode("utf-8", "replace").decode()
