"""Rewards that read a completion as text. What a policy writes is compared and counted, never evaluated."""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from fuchsia_pl.types import ConfigError, Rollout

Reward = Callable[..., list[float]]
Extract = Callable[[str], str | None]

# Longer digit strings are no answers, and Python refuses or takes long to convert them.
MAX_NUMBER_CHARS = 60
NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+|\.(?=$))?", flags=re.ASCII)


def last_between(text: str, tag: str) -> str | None:
    """What stands in the last `<tag>…</tag>` of a text, stripped; None where there is none.

    >>> last_between("<answer>1</answer> no, <answer> 2 </answer>", "answer")
    '2'
    """
    before, closed, _ = text.rpartition(f"</{tag}>")
    _, opened, inside = before.rpartition(f"<{tag}>")
    return inside.strip() if closed and opened else None


def last_turn(rollout: Rollout) -> str:
    """What the policy wrote last, where its answer is; "" where it never came to it."""
    return rollout.turns[-1].text if rollout.turns else ""


def parse_number(text: str) -> Fraction | None:
    """A decimal number, exactly; None for anything else, other scripts' digits included.

    Thousands may be set apart by commas in groups of three; a dollar or euro sign before it, and a per cent sign or one
    final full stop after it, are left out.

    >>> parse_number("$1,234.50"), parse_number("-3"), parse_number("1,23"), parse_number("three")
    (Fraction(2469, 2), Fraction(-3, 1), None, None)
    """
    stripped = text.strip()
    if len(stripped) > MAX_NUMBER_CHARS:
        return None
    sign = stripped[:1] if stripped[:1] in ("+", "-") else ""
    body = stripped[len(sign) :].strip().removeprefix("$").removeprefix("€").removesuffix(".").removesuffix("%").strip()
    number = (sign + body) if not body.startswith(("+", "-")) else body if not sign else ""
    if not any(character in "0123456789" for character in number) or not NUMBER.fullmatch(number):
        return None
    return Fraction(number.replace(",", ""))


def format_tags(*tags: str, name: str = "format") -> Reward:
    """Rewards a completion that is nothing but `<a>…</a>`, `<b>…</b>`, … in this order, each once and not empty.

    reward = 1/2 (share of the opening and closing tags that occur exactly once) + 1/2 [the whole completion has the form]

    Args:
        tags: Names of the tags, in order.
        name: The reward's name in logs.

    Raises:
        ConfigError: No tag is named.

    >>> from fuchsia_pl.types import Completion, Turn
    >>> rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="")
    >>> rollout.append(Turn(Completion((1,), (-0.1,), "stop", None, 0), "<answer>2</answer>", "", "<answer>2</answer>", ""))
    >>> format_tags("answer")([rollout]), format_tags("thinking", "answer")([rollout])
    ([1.0], [0.25])
    """
    if not tags:
        raise ConfigError("format_tags takes at least one tag")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]

    def reward(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
        return [0.5 * _once(r.completion, marks) + 0.5 * _has_form(r.completion, marks) for r in rollouts]

    return _named(reward, name)


def exact_match(field: str = "answer", extract: Extract = str.strip, name: str = "correct") -> Reward:
    """1.0 where what is extracted from the last turn equals the item's field as a string, both stripped.

    Args:
        field: The item's field with the gold answer.
        extract: Takes the answer out of the turn, None where there is none.
        name: The reward's name in logs.
    """

    def reward(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
        return [float(extract(last_turn(r)) == str(r.item[field]).strip()) for r in rollouts]

    return _named(reward, name)


def number_match(field: str = "answer", extract: Extract = str.strip, name: str = "correct") -> Reward:
    """1.0 where what is extracted from the last turn is the same number as the item's field, exactly.

    Args:
        field: The item's field with the gold number.
        extract: Takes the answer out of the turn, None where there is none.
        name: The reward's name in logs.

    Raises:
        ValueError: When called, if an item's field is no number.
    """

    def reward(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
        return [float(_same_number(extract(last_turn(r)), r.item[field])) for r in rollouts]

    return _named(reward, name)


def length_penalty(free_tokens: int, max_tokens: int, name: str = "length") -> Reward:
    """0 up to `free_tokens` sampled tokens, then falling linearly to -1 at `max_tokens` and beyond.

    Args:
        free_tokens: Length that costs nothing.
        max_tokens: Length that costs 1.
        name: The reward's name in logs.

    Raises:
        ConfigError: `free_tokens` is below 0, or not below `max_tokens`.
    """
    if not 0 <= free_tokens < max_tokens:
        raise ConfigError(f"length_penalty takes 0 <= free_tokens < max_tokens, got {free_tokens} and {max_tokens}")

    def reward(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
        over = [(r.num_sampled_tokens - free_tokens) / (max_tokens - free_tokens) for r in rollouts]
        return [-min(max(share, 0.0), 1.0) for share in over]

    return _named(reward, name)


def _once(text: str, marks: list[str]) -> float:
    return sum(text.count(mark) == 1 for mark in marks) / len(marks)


def _has_form(text: str, marks: list[str]) -> bool:
    rest = text.strip()
    if any(rest.count(mark) != 1 for mark in marks):
        return False
    for opening, closing in zip(marks[::2], marks[1::2], strict=True):
        inside, closed, rest = rest.partition(closing)
        if not closed or not inside.startswith(opening) or not inside.removeprefix(opening).strip():
            return False
        rest = rest.lstrip()
    return not rest


def _same_number(answer: str | None, gold: Any) -> bool:
    expected = parse_number(str(gold))
    if expected is None:
        raise ValueError(f"the gold answer {gold!r} is no number")
    return answer is not None and parse_number(answer) == expected


def _named(reward: Reward, name: str) -> Reward:
    reward.__name__ = name
    return reward
