r"""Removes boxes and marks around an answer: LaTeX's `\boxed{…}` and `$…$`, Markdown's `**…**`, GSM8K's `####`, quotes."""

import re

MAX_WRAPPERS = 8
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"  # zero-width characters and the byte-order mark
PREFIXES = ("####", "=")
PAIRS = (
    ("**", "**"),
    ("__", "__"),
    ("*", "*"),
    ("_", "_"),
    ("`", "`"),
    ("$$", "$$"),
    ("$", "$"),
    ('"', '"'),
    ("'", "'"),
    ("\u201c", "\u201d"),
    ("\u2018", "\u2019"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
)
COMMAND = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|mathbf|mathrm|mbox|displaystyle)?\s*(?=\{)|(?=\{)")
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(\{)|\Z)")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")
BRACE = re.compile(r"\\.|[{}]", flags=re.DOTALL)  # an escaped brace is text


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` in a text, stripped; None if there is none or the last one is incomplete.

    >>> last_boxed(r"\boxed{1}? no, \boxed{\frac{1}{2}} it is"), last_boxed(r"\boxed{1}, no, \boxed{\frac{1}{2")
    ('\\frac{1}{2}', None)
    """
    found, start = None, 0
    while (box := BOX.search(text, start)) is not None:
        end = _closing(text, box.end()) if box.group(1) else None
        if end is None:
            return None
        found, start = text[box.end() : end].strip(), end + 1
    return found


def last_sentences(text: str, max_chars: int) -> str:
    """The last whole sentences and lines of a text that fit into `max_chars`; the whole text if its last sentence does not fit.

    >>> last_sentences("First I add. Then I am done. It is 3.", 24)
    'It is 3.'
    """
    stripped = text.strip()
    tail = stripped[-max_chars:]
    start = SENTENCE_END.search(tail) if len(stripped) > max_chars else None
    return tail[start.end() :] if start is not None else stripped


def has_box(text: str) -> bool:
    r"""Whether a text contains a `\boxed{…}`, complete or not."""
    return BOX.search(text) is not None


def unwrapped(text: str) -> str:
    r"""Removes the marks that enclose the whole text, and one final full stop.

    >>> unwrapped(r"**$\boxed{72}$.**"), unwrapped("#### 72"), unwrapped(r"\boxed{72} or \boxed{73}")
    ('72', '72', '\\boxed{72} or \\boxed{73}')
    """
    for _ in range(MAX_WRAPPERS):
        inside = _without_one(text.strip().strip(INVISIBLE).strip())
        if inside == text:
            break
        text = inside
    return text


def _without_one(text: str) -> str:
    for prefix in PREFIXES:
        if text.startswith(prefix):
            return text.removeprefix(prefix).lstrip()
    if text.endswith(".") and not text.endswith(".."):
        return text[:-1].rstrip()
    for opening, closing in PAIRS:
        is_escaped = text.endswith("\\" + closing)
        if (
            len(text) > len(opening + closing)
            and text.startswith(opening)
            and text.endswith(closing)
            and not is_escaped
        ):
            return text[len(opening) : -len(closing)].strip()
    command = COMMAND.match(text)
    if command is not None and _closing(text, command.end() + 1) == len(text) - 1:
        return text[command.end() + 1 : -1].strip()
    return text


def _closing(text: str, start: int) -> int | None:
    """Position of the closing brace, given the `start` of its content; None if there is none."""
    depth = 1
    for mark in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(mark.group(), 0)
        if depth == 0:
            return mark.start()
    return None
