"""Separates a policy's reasoning from what it says: rewards and tool calls read only what is outside of thinking marks."""

import re
from collections.abc import Sequence

# Opening and closing mark of each kind of thinking; reasoning models write one of these.
THINKING_MARKS: tuple[tuple[str, str], ...] = (("<think>", "</think>"), ("<thinking>", "</thinking>"))


def without_thinking(
    text: str, marks: Sequence[tuple[str, str]] = THINKING_MARKS, starts_in_thinking: bool = False
) -> str:
    """Removes the thinking from a turn's text.

    Thinking runs from an opening mark to the next closing mark of its kind. Where none follows, it runs to the end of the
    text, so an unfinished thinking leaves nothing behind it. A closing mark without an opening one ends a thinking that
    began before the text: some chat templates write the opening mark into the prompt.

    Args:
        text: What the policy wrote.
        marks: Pairs of an opening and a closing mark. Without any, the text is returned as it is.
        starts_in_thinking: Whether the prompt ended in an opening mark.

    >>> without_thinking("<think>3? no</think>4"), without_thinking("3? no</think>4"), without_thinking("4 <think>or 3")
    ('4', '4', '4 ')
    >>> without_thinking("3?", starts_in_thinking=True)
    ''
    """
    kept: list[str] = []
    closing_of = dict(marks)
    openings = "|".join(re.escape(opening) for opening, _ in marks)
    rest = text
    # A thinking that began in the prompt ends at the first closing mark that no opening mark precedes.
    first = _first(rest, [closing for _, closing in marks])
    opened = re.search(openings, rest) if openings else None
    if first is not None and (opened is None or first[0] < opened.start() or starts_in_thinking):
        rest = rest[first[1] :]
    elif starts_in_thinking:
        return ""
    while openings and (found := re.search(openings, rest)) is not None:
        kept.append(rest[: found.start()])
        _, closed, rest = rest[found.end() :].partition(closing_of[found.group()])
        if not closed:
            rest = ""
    return "".join([*kept, rest])


def ends_in_opening_mark(text: str, marks: Sequence[tuple[str, str]] = THINKING_MARKS) -> bool:
    r"""Whether a prompt leaves the policy inside of a thinking.

    >>> ends_in_opening_mark("<|im_start|>assistant\n<think>\n")
    True
    """
    return any(text.rstrip().endswith(opening) for opening, _ in marks)


def _first(text: str, marks: Sequence[str]) -> tuple[int, int] | None:
    """Start and end of the earliest of some marks in a text."""
    found = [(text.find(mark), text.find(mark) + len(mark)) for mark in marks if mark in text]
    return min(found, default=None)
