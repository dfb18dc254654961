"""Reads rows from JSON lines or a JSON array. Values keep their JSON types."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from fuchsia_pl.envs.rows import JSONRows, check_row, unreadable

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_SPACE = b" \t\r\n"  # bytes.strip() without an argument also strips bytes that JSON does not allow
# Python's decoder fails near 1,000 levels, minus the depth of the call stack when a row is decoded again.
MAX_DEPTH = 200
TOO_DEEP = f"it is nested too deeply: {MAX_DEPTH} levels of lists and objects are allowed"
SPACES = re.compile(r"[ \t\r\n]*")


def read_json(file: str, lines: list[bytes]) -> JSONRows:
    r"""The rows of a file of JSON lines or of one JSON array. Each row is decoded once here, so that no later access fails.

    Args:
        file: Name of the file, for messages.
        lines: Lines of the file, including line ends.

    Raises:
        ConfigError: A row is not UTF-8, not JSON or not an object, repeats a key, or contains a number that is too large.

    >>> list(read_json("a.jsonl", [b'{"n": 72}\n', b'{"n": 0.5}\n']))
    [{'n': 72}, {'n': 0.5}]
    >>> list(read_json("a.json", [b'[{"day": "2024-01-05"}]']))
    [{'day': '2024-01-05'}]
    """
    if lines:
        lines = [lines[0].removeprefix(BYTE_ORDER_MARK), *lines[1:]]
    first = next((line.strip(JSON_SPACE) for line in lines if line.strip(JSON_SPACE)), b"")
    found = list(_array(file, lines) if first.startswith(b"[") else _lines(file, lines))
    return JSONRows(file, [text for text, _ in found], [place for _, place in found])


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at a position, and the position after it.

    Raises:
        ValueError: The text is not valid JSON there. The message describes the fault.

    >>> decode('{"a": [1, 2.5]} …')
    ({'a': [1, 2.5]}, 15)
    >>> decode('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' occurs twice in one object
    """
    try:
        value, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if _is_too_deep(value):
        raise ValueError(TOO_DEEP)
    return value, end


def decode_whole(text: str) -> Any:
    """The JSON value of a text that contains exactly one.

    Raises:
        ValueError: The text is not one JSON value. The message describes the fault.

    >>> decode_whole(' [1] ')
    [1]
    """
    value, end = decode(text, _skip(text, 0))
    end = _skip(text, end)
    if end < len(text):
        raise ValueError(f"there is text after its end (column {end + 1})")
    return value


def finite(digits: str) -> float:
    """Converts the text of a number to a float.

    Raises:
        ValueError: It is too large for a float and would become infinite.

    >>> finite("0.5")
    0.5
    """
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits} is too large for a float")
    return number


def _is_too_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        entries = [entry for part in level for entry in (part.values() if isinstance(part, dict) else part)]
        level = [entry for entry in entries if isinstance(entry, dict | list)]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=finite)


def _lines(file: str, lines: list[bytes]) -> Iterator[tuple[bytes, str]]:
    for number, line in enumerate(lines, start=1):
        line, place = line.strip(JSON_SPACE), f"line {number}"
        if not line:
            continue
        text = _text(file, place, line)
        try:
            value = decode_whole(text)
        except ValueError as error:
            raise unreadable(
                file, place, _broken_field(text), f"{error}. A row must be a JSON object on one line"
            ) from error
        check_row(file, place, value)
        yield line, place


def _array(file: str, lines: list[bytes]) -> Iterator[tuple[bytes, str]]:
    text = "".join(_text(file, f"line {number}", line) for number, line in enumerate(lines, start=1))
    position = _skip(text, _skip(text, 0) + 1)
    row, line, counted = 0, 1, 0
    goes_on = text[position : position + 1] != "]"
    while goes_on:
        row, line, counted = row + 1, line + text.count("\n", counted, position), position
        place = f"row {row}, line {line}"
        try:
            value, end = decode(text, position)
        except ValueError as error:
            raise unreadable(file, place, _broken_field(text[position:]), error) from error
        check_row(file, place, value)
        yield text[position:end].encode(), place
        end = _skip(text, end)
        if text[end : end + 1] not in (",", "]"):
            raise unreadable(file, f"after {place}", None, "the array lacks a comma or its closing bracket")
        goes_on = text[end] == ","
        position = _skip(text, end + 1) if goes_on else end
    if text[position + 1 :].strip(JSON_SPACE.decode()):
        raise unreadable(file, "", None, "there is text after the end of the array. Use one array, or JSON lines")


def _text(file: str, place: str, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise unreadable(file, place, None, f"byte {error.start + 1} is not UTF-8") from error


def _broken_field(text: str) -> str | None:
    """The first key of an object with an unreadable value; None if the fault is elsewhere."""
    position = _skip(text, 0)
    if text[position : position + 1] != "{":
        return None
    while True:
        try:
            key, position = decode(text, _skip(text, position + 1))
        except ValueError:
            return None
        position = _skip(text, position)
        if not isinstance(key, str) or text[position : position + 1] != ":":
            return None
        try:
            _, position = decode(text, _skip(text, position + 1))
        except ValueError:
            return key
        position = _skip(text, position)
        if text[position : position + 1] != ",":
            return None if text[position : position + 1] == "}" else key


def _skip(text: str, position: int) -> int:
    found = SPACES.match(text, position)
    assert found is not None, "the pattern matches the empty string"
    return found.end()
