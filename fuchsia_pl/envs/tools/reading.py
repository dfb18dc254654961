"""Finds the tool calls in a turn's text and reads their JSON.

The text is hostile: no text raises, and the time is linear in its length. A call that cannot be read becomes a
`ToolCall` with an error, which the policy reads.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fuchsia_pl.envs.thinking import any_of
from fuchsia_pl.envs.tools.spec import ToolCall, ToolSpec

# Limits of one call. Servers based on pydantic refuse JSON of more than 200 nested levels, and Python's decoder raises a
# RecursionError near 1,000.
MAX_CALL_CHARS = 100_000
MAX_CALL_DEPTH = 64
MAX_NUMBER_DIGITS = 4000
# Limits of one turn: calls that are read, and JSON objects that are searched for calls without tags.
MAX_CALLS = 64
MAX_OBJECTS = 1000
# Models use both keys for the arguments, regardless of the key in the chat template.
ARGUMENTS_KEYS = ("arguments", "parameters")
# Llama writes this token before a call, although its chat template shows calls without a tag.
PYTHON_TAG = "<|python_tag|>"

_SPACE = re.compile(r"\s*")
_JOINT = re.compile(r"[\s;,]*")
_OBJECT = re.compile(r'\{\s*"')
_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) <= MAX_NUMBER_DIGITS else math.inf)


@dataclass(frozen=True)
class TurnCalls:
    """Calls found in a turn.

    Attributes:
        calls: The calls, in order.
        is_cut: Whether the text ends inside the JSON of a call, which further text might complete.

    >>> TurnCalls((), is_cut=False).calls
    ()
    """

    calls: tuple[ToolCall, ...]
    is_cut: bool


@dataclass(frozen=True)
class _Read:
    """A JSON value in a text, or the fault at its position.

    Attributes:
        value: The value; None if it is not JSON.
        end: Position where reading stopped; the end of the text if later text cannot be distinguished from the value's.
        error: Description of the fault; None if there is none.
        is_cut: Whether further text might complete the value.
        is_beyond: Whether the value exceeds a limit.
    """

    value: Any
    end: int
    error: str | None = None
    is_cut: bool = False
    is_beyond: bool = False


def read_tagged(text: str, opening: str, closing: str, tools: Sequence[ToolSpec]) -> TurnCalls:
    """Reads the calls after an opening tag.

    Tags count everywhere outside of a call's JSON: the end of a call is the end of its JSON, so its strings may contain any
    tag.

    Args:
        text: Text of the turn, without its thinking.
        opening: Tag before the JSON of a call.
        closing: Tag that must follow the JSON; "" if none is required.
        tools: Available tools.
    """
    calls: list[ToolCall] = []
    is_cut = False
    place = text.find(opening)
    while place >= 0 and len(calls) <= MAX_CALLS:
        body = place + len(opening)
        found, place, is_cut = _read_body(text, body, closing, tools)
        if found[-1].error is not None:  # its strings contain no calls
            place = max(place, end_of_json(text, body, (opening, closing)))
        calls += found
        place = text.find(opening, place)
    return TurnCalls(_bounded(calls), is_cut)


def read_bare(text: str, tools: Sequence[ToolSpec]) -> TurnCalls:
    """Reads calls that a model writes as JSON without tags.

    An object is a call if it names a tool, or has a "name" and arguments. Any other JSON is part of an answer. A value inside
    another JSON value is not a call, except for the entries of a list.

    Args:
        text: Text of the turn, without its thinking.
        tools: Available tools.
    """
    calls: list[ToolCall] = []
    begins_a_call, place, is_cut = beginning(tools), 0, False
    for _ in range(MAX_OBJECTS):
        found = _OBJECT.search(text, place)
        if found is None or len(calls) > MAX_CALLS:
            break
        read = _read_value(text, found.start())
        is_call = _is_call(read.value, tools)
        if read.value is None:
            is_call = begins_a_call.match(text, found.start()) is not None
        place = max(read.end, found.end())
        if read.error is not None and is_call:  # its strings contain no calls
            place = max(place, end_of_json(text, found.start(), ()))
        if read.error is None:
            calls += _calls(read.value, tools) if is_call else []
        elif is_call or read.is_beyond:
            calls.append(unreadable(read.error))
            is_cut = read.is_cut
    else:
        if _naming(tools).search(text, place) is not None:
            calls.append(unreadable(f"only the first {MAX_OBJECTS} JSON objects of a turn are read"))
    if not calls and PYTHON_TAG in text:
        calls.append(unreadable(f'after {PYTHON_TAG} there is no JSON object with a "name" and its "parameters"'))
    return TurnCalls(_bounded(calls), is_cut)


def beginning(tools: Sequence[ToolSpec]) -> re.Pattern[str]:
    """Matches the beginning of a call without tags, to recognise a call with malformed JSON.

    >>> [bool(beginning([]).match(text)) for text in ('{"name": "Al", "age', '{"name": "f", "arguments', '{"arguments": {')]
    [False, True, True]
    """
    names = [re.escape(json.dumps(tool.name)) for tool in tools]
    any_name = r'"[^"\\]{1,100}"\s*,\s*"(?:arguments|parameters)'
    wrapping = r'(?:"id"\s*:\s*"[^"\\]{0,100}"\s*,\s*)?(?:"type"\s*:\s*"function"\s*,\s*)?(?:"function"\s*:\s*\{\s*)?'
    named = rf'"name"\s*:\s*(?:{"|".join([*names, any_name])})'
    return re.compile(rf'\{{\s*{wrapping}(?:{named}|"(?:arguments|parameters)"\s*:\s*\{{)')


def end_of_json(text: str, place: int, stops: Sequence[str]) -> int:
    """Finds the end of the JSON values at a position, even if they are malformed.

    Only strings and brackets are tracked, so that a string with a line break or an unknown escape hides its content like any
    other.

    Args:
        text: Text of the turn.
        place: Position of the first value, or of spaces before it.
        stops: Texts that end malformed JSON if they occur outside of its strings: tags, thinking marks. Empty texts are
            ignored.

    Returns:
        The position after the last value; `place` if there is no object or list; the end of the text if a value does not end
        or exceeds the maximum length of a call.

    >>> end_of_json('{"a": "}<b>"} <b>', 0, ["<b>"]), end_of_json('{"a": <b>}', 0, ["<b>"]), end_of_json('{"a": "', 0, [])
    (13, 6, 7)
    """
    token = _json_token(tuple(stop for stop in stops if stop))
    for _ in range(MAX_OBJECTS):
        start = _JOINT.match(text, place).end()  # type: ignore[union-attr]  # it matches anything
        if not text.startswith(("{", "["), start):
            break
        depth = 0
        for found in token.finditer(text, start, start + MAX_CALL_CHARS + 1):
            if found.lastgroup == "stop":
                return found.start()
            depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found.group(), 0)
            if depth == 0:
                place = found.end()
                break
        else:
            return len(text)
    return place


@lru_cache(maxsize=64)
def _json_token(stops: tuple[str, ...]) -> re.Pattern[str]:
    """Matches the tokens that determine the end of JSON: stops, strings (the last one may be unterminated) and brackets."""
    stop = f"(?P<stop>{any_of(stops)})|" if stops else ""
    return re.compile(stop + r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[{}\[\]]', re.DOTALL)


def unreadable(why: str) -> ToolCall:
    """A call with an error, which the policy reads."""
    return ToolCall("", {}, f"the call cannot be read: {why}")


def unsendable(value: Any) -> str | None:
    """The reason why a value cannot be sent to a tool as JSON; None if it can be sent.

    >>> unsendable({"a": [1, "é"]}), unsendable([float("inf")])
    (None, 'it contains a number that is not finite, or one of more than 4000 digits')
    """
    waiting = [(value, 1)]
    while waiting:
        part, depth = waiting.pop()
        if depth > MAX_CALL_DEPTH:
            return f"it is nested too deeply, {MAX_CALL_DEPTH} levels are allowed"
        if isinstance(part, float) and not math.isfinite(part):
            return f"it contains a number that is not finite, or one of more than {MAX_NUMBER_DIGITS} digits"
        if isinstance(part, str) and not _is_unicode(part):
            return "it is not JSON of Unicode text: a string contains half of a surrogate pair"
        if isinstance(part, dict):
            waiting += [(inner, depth + 1) for pair in part.items() for inner in pair]
        elif isinstance(part, list):
            waiting += [(inner, depth + 1) for inner in part]
    return None


def _read_body(text: str, place: int, closing: str, tools: Sequence[ToolSpec]) -> tuple[list[ToolCall], int, bool]:
    """The calls after one opening tag, the position where reading stopped, and whether the text ends inside their JSON."""
    calls: list[ToolCall] = []
    while True:
        read = _read_value(text, place)
        if read.error is not None:
            return [*calls, unreadable(read.error)], read.end, read.is_cut
        calls += _calls(read.value, tools)
        place = _JOINT.match(text, read.end).end()  # type: ignore[union-attr]  # it matches anything
        if closing and text.startswith(closing, place):
            return calls, place + len(closing), False
        if not text.startswith(("{", "["), place) or len(calls) > MAX_CALLS:
            break
    # A call without its closing tag is not run: the policy may not have finished it.
    return [unreadable(f"it does not end with {closing}")] if closing else calls, read.end, False


def _read_value(text: str, place: int) -> _Read:
    start = _SPACE.match(text, place).end()  # type: ignore[union-attr]  # it matches anything
    window = text[start : start + MAX_CALL_CHARS + 1]
    try:
        value, length = _DECODER.raw_decode(window)
    except json.JSONDecodeError as error:
        is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(window)
        if is_cut and len(window) > MAX_CALL_CHARS:
            return _too_long(text)
        # No JSON can follow an unterminated string: the JSON would need another quote.
        return _Read(None, len(text) if is_cut else start + error.pos, f"it is not JSON ({error})", is_cut)
    except RecursionError:
        return _Read(None, len(text), "its JSON is nested too deeply", is_beyond=True)
    return _too_long(text) if length > MAX_CALL_CHARS else _Read(value, start + length, unsendable(value))


def _too_long(text: str) -> _Read:
    return _Read(None, len(text), f"it has more than {MAX_CALL_CHARS} characters", is_beyond=True)


def _calls(value: Any, tools: Sequence[ToolSpec]) -> list[ToolCall]:
    """The calls in one JSON value, at least one."""
    entries = value if isinstance(value, list) and value else [value]
    return [_call(entry, tools) for entry in entries[: MAX_CALLS + 1]]


def _call(entry: Any, tools: Sequence[ToolSpec]) -> ToolCall:
    entry = _unwrapped(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return unreadable('it is not a JSON object with a "name"')
    name, given = entry["name"], [key for key in ARGUMENTS_KEYS if entry.get(key) is not None]
    if not given:
        taken = next((tool.argument_names() for tool in tools if tool.name == name), [])
        why = f'it has no "arguments", but {name} takes {taken}'
        return unreadable(why[:500]) if taken else ToolCall(name, {}, None)
    if len(given) > 1 and entry[given[0]] != entry[given[1]]:
        return unreadable('it has "arguments" and "parameters" that differ')
    arguments = entry[given[0]]
    if isinstance(arguments, str):
        read = _read_value(arguments, 0)
        is_whole = read.error is None and not arguments[read.end :].strip()
        arguments = read.value if is_whole else None
    if not isinstance(arguments, dict):
        return unreadable(f'its "{given[0]}" are not a JSON object')
    return ToolCall(name, arguments, None)


def _unwrapped(entry: Any) -> Any:
    """The call inside OpenAI's form, {"type": "function", "function": {"name": …}}. Any other entry is returned unchanged."""
    if isinstance(entry, dict) and "name" not in entry and isinstance(entry.get("function"), dict):
        return entry["function"]
    return entry


def _is_call(value: Any, tools: Sequence[ToolSpec]) -> bool:
    """Whether a JSON value without tags is a call."""
    value = _unwrapped(value)
    name = value.get("name") if isinstance(value, dict) else None
    return isinstance(name, str) and (
        any(key in value for key in ARGUMENTS_KEYS) or any(tool.name == name for tool in tools)
    )


def _naming(tools: Sequence[ToolSpec]) -> re.Pattern[str]:
    """Matches the name of a tool, or any name before arguments. The pattern begins with fixed text, so the search is fast."""
    names = [re.escape(json.dumps(tool.name)) for tool in tools]
    any_name = r'"[^"\\]{1,100}"\s*,\s*"(?:arguments|parameters)"'
    return re.compile(rf'"name"\s*:\s*(?:{"|".join([*names, any_name])})')


def _bounded(calls: list[ToolCall]) -> tuple[ToolCall, ...]:
    if len(calls) <= MAX_CALLS:
        return tuple(calls)
    return (*calls[:MAX_CALLS], unreadable(f"only the first {MAX_CALLS} calls of a turn are read"))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
