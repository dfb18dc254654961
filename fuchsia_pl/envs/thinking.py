"""Separates reasoning from answers: rewards and tool calls use only the text outside of thinking marks."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fuchsia_pl.types import ConfigError

# Opening and closing mark of each kind of thinking; reasoning models write one of these.
THINKING_MARKS: tuple[tuple[str, str], ...] = (("<think>", "</think>"), ("<thinking>", "</thinking>"))
# Maximum number of opaque parts in a turn, at least as many as calls are read. After these, marks count everywhere.
MAX_OPAQUE = 1000


@dataclass(frozen=True)
class Opaque:
    """Parts of a text in which marks are ordinary characters, such as the JSON of a tool call.

    Attributes:
        opening: Regular expression of the beginning of such a part.
        end: Returns the end of the part, given a match of `opening` and all marks.

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

    Thinking extends from an opening mark to the next closing mark of its kind, or to the end of the text if there is none, so
    all text after unfinished thinking is removed. A closing mark outside of thinking has no visible opening mark: the opening
    mark is in the prompt, where some chat templates write it, or belongs to thinking that encloses other thinking. The text
    between such a closing mark and the mark before it is thinking too.

    Args:
        text: Text of a turn.
        marks: Pairs of an opening and a closing mark. If empty, the text is returned unchanged.
        starts_in_thinking: Whether the prompt ends with an opening mark.
        opaque: Parts in which marks do not count. Only parts outside of thinking are recognised, at most `MAX_OPAQUE`.

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
    """Whether a text ends inside thinking. The arguments are those of `without_thinking`.

    >>> ends_in_thinking("<think>3? no</think>4 <think>or"), ends_in_thinking("<think>3? no</think>4")
    (True, False)
    """
    return _split(text, marks, starts_in_thinking, opaque)[1]


def ends_in_opening_mark(text: str, marks: Sequence[tuple[str, str]] = THINKING_MARKS) -> bool:
    r"""Whether a prompt ends with an opening mark, so that the policy starts inside thinking.

    >>> ends_in_opening_mark("<|im_start|>assistant\n<think>\n")
    True
    """
    return any(text.rstrip().endswith(opening) for opening, _ in marks)


def check_marks(marks: Sequence[tuple[str, str]]) -> None:
    """Rejects marks that cannot be found in a text.

    Raises:
        ConfigError: They are not pairs of texts, a mark is blank, or two pairs have the same opening mark.
    """
    are_pairs = not isinstance(marks, str) and all(
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(mark, str) and mark.strip() for mark in pair)
        for pair in marks
    )
    if not are_pairs or len({opening for opening, _ in marks}) < len(marks):
        raise ConfigError(
            f"thinking_marks is {marks!r}: it must be pairs of an opening and a closing mark, without blank marks and "
            'without repeated opening marks, such as [("<think>", "</think>")], or [] for no thinking'
        )


def _split(
    text: str, marks: Sequence[tuple[str, str]], starts_in_thinking: bool, opaque: Opaque | None
) -> tuple[str, bool]:
    """The text outside of thinking, and whether the text ends inside thinking."""
    if not marks:
        return text, False
    closing_of = dict(marks)
    all_marks = tuple(mark for pair in marks for mark in pair)
    landmark = any_mark = re.compile(any_of(all_marks))
    if opaque is not None:
        landmark = re.compile(f"(?P<opaque>{opaque.opening})|{any_of(all_marks)}")
    kept: list[str] = []
    place = 0  # start of the text outside of thinking that is not yet kept
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
            place = found.end()  # the end of thinking without a visible opening mark
        search_from = place
    return "".join([*kept, text[place:]]), False


def any_of(texts: Sequence[str]) -> str:
    r"""Regular expression that matches any of the texts, the longest one if several match at a position.

    >>> any_of(["a", "ab.", "c"])
    'ab\\.|a|c'
    """
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
