"""Values of a run's files in the form in which the page takes them: finite rounded numbers, bounded texts."""

import math
from typing import Any

from fuchsia_pl.types import shortened

SIGNIFICANT_DIGITS = 4
MAX_WHOLE = 1e15
MAX_TEXT_CHARS = 50_000


def number(value: Any) -> float | int | None:
    """A number with four significant digits. None for a value that is no number or not finite.

    >>> number(0.123456), number("2.0"), number(float("nan")), number("many"), number(123456)
    (0.1235, 2, None, None, 123456)
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        exact = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(exact):
        return None
    # Whole numbers keep their digits: they are counts and steps.
    return int(exact) if exact.is_integer() and abs(exact) < MAX_WHOLE else float(f"{exact:.{SIGNIFICANT_DIGITS}g}")


def numbers(values: Any) -> list[float | int | None]:
    """The numbers of a list; none of anything else.

    >>> numbers([0.5, None, "x"]), numbers("0.5")
    ([0.5, None, None], [])
    """
    return [number(value) for value in values] if isinstance(values, list) else []


def text(value: Any, limit: int = MAX_TEXT_CHARS) -> str:
    """A text of at most about `limit` characters, with the number of characters that were left out of its middle.

    >>> text("abcdefghij", 4), text(None), text(3)
    ('ab… (6 characters left out) …ij', '', '3')
    """
    return shortened("" if value is None else str(value), limit)


def whole(value: Any, default: int = 0) -> int:
    """A whole number of a file, or the default in place of anything else.

    >>> whole(3), whole("3"), whole(None), whole(float("inf"))
    (3, 3, 0, 0)
    """
    found = number(value)
    return default if found is None else int(found)
