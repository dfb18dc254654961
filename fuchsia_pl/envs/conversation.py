"""Validates the prompt messages of an item before any sampling."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fuchsia_pl.envs.user_code import reason, user_code
from fuchsia_pl.types import ConfigError, Item, Message

HALF = re.compile("[\ud800-\udfff]")
ALLOWED = 'a prompt is a text or a list of messages {"role": …, "content": …}'


def prompt_messages(item: Item, field: str) -> list[Message]:
    """The messages in a field of an item: a text becomes one user message, a list of messages is used as it is.

    Raises:
        ConfigError: The field is missing, null, empty, or of another type.

    >>> prompt_messages({"prompt": "3 plus 4?"}, "prompt")
    [{'role': 'user', 'content': '3 plus 4?'}]
    >>> prompt_messages({"prompt": [{"role": "user", "content": "3 plus 4?"}]}, "prompt")
    [{'role': 'user', 'content': '3 plus 4?'}]
    >>> prompt_messages({"prompt": None}, "prompt")
    Traceback (most recent call last):
    fuchsia_pl.types.ConfigError: field 'prompt' is null: a prompt is a text or a list of messages {"role": …, "content": …}
    """
    if field not in item:
        raise ConfigError(
            f"the item has no field {field!r}, it has {sorted(map(str, item))}: set data.environment.init_args.prompt_field, "
            "or override messages(item)"
        )
    value = item[field]
    if isinstance(value, str) and value.strip():
        return checked_messages([{"role": "user", "content": value}], f"field {field!r}")
    if isinstance(value, list | tuple) and value:
        return checked_messages(value, f"field {field!r}")
    what = "empty" if isinstance(value, str | list | tuple) else _kind(value)
    raise ConfigError(f"field {field!r} is {what}: {ALLOWED}")


def conversation(messages: Callable[[Item], Any], item: object) -> list[Message]:
    """Calls an environment's `messages(item)` and validates the result. The messages are copies.

    Args:
        messages: The method.
        item: The item.

    Raises:
        ConfigError: The item is not a mapping, the method raises, or its result is not a valid list of messages.
    """
    if not isinstance(item, Mapping):
        raise ConfigError(f"it is {_kind(item)}, but an item must be a mapping of names to values")
    try:
        with user_code():
            found = messages(item)
    except ConfigError:
        raise
    except Exception as error:  # an exception of user code is reported with its item
        raise ConfigError(f"messages(item) raised {reason(error)}") from error
    if not isinstance(found, list | tuple) or not found:
        what = "an empty list" if isinstance(found, list | tuple) else _kind(found)
        raise ConfigError(
            f'messages(item) returned {what}: it must return a list of messages such as {{"role": "user", "content": "…"}}'
        )
    return checked_messages(found, "messages(item)")


def checked_messages(messages: Sequence[Any], what: str) -> list[Message]:
    """Validates messages and returns copies. Content parts of type "text" are joined to one text.

    Args:
        messages: The messages.
        what: Origin of the messages, for errors.

    Raises:
        ConfigError: An entry is not a message, a content is not text, a user message or the last message is empty, or the
            last message is one of the assistant.

    >>> checked_messages([{"role": "user", "content": [{"type": "text", "text": "3 plus "}, {"type": "text", "text": "4?"}]}], "")
    [{'role': 'user', 'content': '3 plus 4?'}]
    """
    checked = [_checked(message, f"{what}, message {number}") for number, message in enumerate(messages)]
    last = checked[-1]
    if last["role"] == "assistant":
        raise ConfigError(
            f"{what} ends with a message of the assistant: the policy writes the turn after the last message"
        )
    for number, message in enumerate(checked):
        is_asked = message is last and message["role"] != "tool"  # the result of a tool may be empty
        if not message["content"].strip() and (message["role"] == "user" or is_asked):
            raise ConfigError(f"{what}, message {number} ({message['role']}) is empty: it must contain text")
    return checked


def _checked(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ConfigError(f'{where} is {_kind(message)}: a message is {{"role": …, "content": …}}')
    # Arrow adds the keys of other rows, with null values.
    others = {name: value for name, value in message.items() if value is not None}
    # An earlier turn of the assistant may consist of tool calls only.
    given = {"content": "", **others} if others.get("tool_calls") else message
    missing = [name for name in ("role", "content") if name not in given]
    if missing:
        raise ConfigError(f"{where} has no {missing[0]!r}, it has {sorted(map(str, message))}")
    role = given["role"]
    if not isinstance(role, str) or not role.strip():
        what = "empty" if isinstance(role, str) else _kind(role)
        raise ConfigError(f'{where}: its role is {what}, but must be a text such as "user"')
    for name, value in others.items():
        if name != "content":  # `_text` checks the content
            _check_halves(name, f"{where}: the name of a field")
            _check_halves(value, f"{where}: its field {name!r}")
    return {**others, "role": role, "content": _text(given["content"], f"{where} ({role})")}


def _text(content: Any, where: str) -> str:
    if isinstance(content, list | tuple):
        content = "".join(_part(part, f"{where}, part {number}") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise ConfigError(f"{where}: its content is {_kind(content)}, but must be a text")
    _check_halves(content, f"{where}: its content")
    return content


def _check_halves(value: Any, where: str) -> None:
    """Rejects half of a surrogate pair in a text or in any text of a JSON value, including its keys."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            waiting += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            waiting += part
        elif isinstance(part, str) and (half := HALF.search(part)) is not None:
            raise ConfigError(
                f"{where}: character {half.start()} is half of a surrogate pair, which no tokenizer can encode"
            )


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        what = _kind(part) if kind is None else f"of type {kind!r}"
        raise ConfigError(f'{where} is {what}: the policy reads only text, as {{"type": "text", "text": "…"}}')
    text: str = part["text"]
    return text


def _kind(value: Any) -> str:
    """Describes a value, in JSON terms if it has a JSON type."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"the number {value}" if -1e15 < value < 1e15 else "a number"
    if isinstance(value, str | list | tuple | Mapping):
        return "a text" if isinstance(value, str) else "an object" if isinstance(value, Mapping) else "a list"
    return f"of type {type(value).__name__}"
