"""Separates a policy's reasoning from what it says: rewards and tool calls read only what is outside of thinking marks."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fuchsia_pl.types import ConfigError

# Opening and closing mark of each kind of thinking; reasoning models write one of these.
THINKING_MARKS: tuple[tuple[str, str], ...] = (("<think>", "</think>"), ("<thinking>", "</thinking>"))
# No reader reads more calls of a turn than this; in what follows, marks count everywhere.
MAX_OPAQUE = 1000


@dataclass(frozen=True)
class Opaque:
    """Parts of a text in which marks are characters like any other, such as the JSON of a tool call.

    Attributes:
        opening: Regular expression of how such a part begins.
        end: Takes a match of `opening` and all marks. Returns where the part ends.

    >>> without_thinking("#<think> <think>3", opaque=Opaque("#", lambda match, _: match.string.index(" ", match.end())))
    '#<think> '
    """

    opening: str
    end: Callable[[re.Match[str], tuple[str, ...]], int]


def without_thinking(
    text: str,
    marks: Sequence[tuple[str, str]] = THINKING_MARKS,
    starts_in_thinking: bool = False,
    opaque: Opaque | None = None,
) -> str:
    """Removes the thinking from a turn's text, in linear time.

    Thinking runs from an opening mark to the next closing mark of its kind. Where none follows, it runs to the end of the
    text, so an unfinished thinking leaves nothing behind it. A closing mark outside of thinking ends a thinking that began
    unnoticed: in the prompt, where some chat templates write the opening mark, or around another thinking. What stands
    before such a mark, back to the mark before it, is thinking too.

    Args:
        text: What the policy wrote.
        marks: Pairs of an opening and a closing mark. Without any, the text is returned as it is.
        starts_in_thinking: Whether the prompt ended in an opening mark.
        opaque: Parts in which no mark counts. They are found outside of thinking only, and only the first `MAX_OPAQUE`.

    >>> without_thinking("<think>3? no</think>4"), without_thinking("3? no</think>4"), without_thinking("4 <think>or 3")
    ('4', '4', '4 ')
    >>> without_thinking("<think>3? <think>5?</think> 6?</think>4"), without_thinking("3?", starts_in_thinking=True)
    ('4', '')
    """
    return _split(text, marks, starts_in_thinking, opaque)[0]


def ends_in_thinking(
    text: str,
    marks: Sequence[tuple[str, str]] = THINKING_MARKS,
    starts_in_thinking: bool = False,
    opaque: Opaque | None = None,
) -> bool:
    """Whether a text, of the same arguments as `without_thinking`, ends before its thinking does.

    >>> ends_in_thinking("<think>3? no</think>4 <think>or"), ends_in_thinking("<think>3? no</think>4")
    (True, False)
    """
    return _split(text, marks, starts_in_thinking, opaque)[1]


def ends_in_opening_mark(text: str, marks: Sequence[tuple[str, str]] = THINKING_MARKS) -> bool:
    r"""Whether a prompt leaves the policy inside of a thinking.

    >>> ends_in_opening_mark("<|im_start|>assistant\n<think>\n")
    True
    """
    return any(text.rstrip().endswith(opening) for opening, _ in marks)


def check_marks(marks: Sequence[tuple[str, str]]) -> None:
    """Refuses marks that could not be found in a text.

    Raises:
        ConfigError: They are no pairs of texts, one is empty, or two kinds of thinking open alike.
    """
    are_pairs = not isinstance(marks, str) and all(
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(mark, str) and mark.strip() for mark in pair)
        for pair in marks
    )
    if not are_pairs or len({opening for opening, _ in marks}) < len(marks):
        raise ConfigError(
            f"thinking_marks is {marks!r}: it takes pairs of an opening and a closing mark, neither of them blank and no "
            'opening mark twice, such as [("<think>", "</think>")], or [] where nothing counts as thinking'
        )


def _split(
    text: str, marks: Sequence[tuple[str, str]], starts_in_thinking: bool, opaque: Opaque | None
) -> tuple[str, bool]:
    """What stands outside of thinking, and whether the text ends inside of it."""
    if not marks:
        return text, False
    closing_of = dict(marks)
    all_marks = tuple(mark for pair in marks for mark in pair)
    landmark = any_mark = re.compile(any_of(all_marks))
    if opaque is not None:
        landmark = re.compile(f"(?P<opaque>{opaque.opening})|{any_of(all_marks)}")
    kept: list[str] = []
    place = 0  # where the text outside of thinking goes on that is not yet kept
    if starts_in_thinking:
        closing = re.compile(any_of(list(closing_of.values()))).search(text)
        if closing is None:
            return "", True
        place = closing.end()
    search_from, num_opaque = place, 0
    while (found := landmark.search(text, search_from)) is not None:
        mark = found.group()
        if opaque is not None and found.lastgroup == "opaque":
            search_from, num_opaque = max(opaque.end(found, all_marks), found.end()), num_opaque + 1
            landmark = landmark if num_opaque < MAX_OPAQUE else any_mark
            continue
        if mark in closing_of:
            kept.append(text[place : found.start()])
            end = text.find(closing_of[mark], found.end())
            if end < 0:
                return "".join(kept), True
            place = end + len(closing_of[mark])
        else:
            place = found.end()  # the end of a thinking that began unnoticed
        search_from = place
    return "".join([*kept, text[place:]]), False


def any_of(texts: Sequence[str]) -> str:
    r"""Regular expression of any of some texts, the longest where several begin at one place.

    >>> any_of(["a", "ab.", "c"])
    'ab\\.|a|c'
    """
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
