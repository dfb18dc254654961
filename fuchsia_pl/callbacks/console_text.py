"""Texts of a policy on the console: bounded, and without characters that control a terminal."""

import unicodedata

from rich.panel import Panel
from rich.text import Text

from fuchsia_pl.samples import Sample
from fuchsia_pl.types import Rollout, Row

MAX_PROMPT_CHARS = 800
MAX_TEXT_CHARS = 2400
MAX_LINES = 24
# Format characters that scripts and emoji need: zero-width joiner and non-joiner.
JOINERS = "\u200c\u200d"
# Control characters, format characters (which reorder text), lone surrogates, line and paragraph separators.
ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: str) -> str:
    r"""A text in which every character that controls a terminal is an escape. Line breaks and tabs stay.

    >>> visible("\x1b[2Jgone\r\u202e"), visible("a\n\tb")
    ('\\x1b[2Jgone\\r\\u202e', 'a\n\tb')
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ESCAPED and char not in "\n\t" + JOINERS
        else char
        for char in text
    )


def shortened(text: str, max_chars: int, max_lines: int = MAX_LINES) -> str:
    """A text without its middle, if it is long. A note in its place has the number of characters.

    Args:
        text: The text.
        max_chars: Characters that are kept.
        max_lines: Lines that are kept.

    >>> shortened("one two three four", max_chars=8)
    'one  [… 10 characters …] four'
    """
    lines, half, half_lines = text.splitlines(keepends=True), max_chars // 2, max_lines // 2
    if len(text) <= max_chars and len(lines) <= max_lines:
        return text
    head = "".join(lines[: max_lines - half_lines])[: max_chars - half]
    tail = "".join(lines[-half_lines:])[-half:]
    return f"{head} [… {len(text) - len(head) - len(tail)} characters …] {tail}"


def bounded(text: str, max_chars: int) -> Text:
    """A text of a policy for the console: bounded, visible, and never read as markup."""
    # Escapes are longer than their characters, so the result is bounded once more.
    return Text(shortened(visible(shortened(text, max_chars)), max_chars))


def completion_panel(sample: Sample) -> Panel:
    """A prompt and its completion with the rewards."""
    rollout = sample.rollout
    where = f"item {rollout.item_index}, sibling {rollout.sibling}"
    title = f"{where}: {rewards_text(rollout)}, advantage {sample.mean_advantage:+.2f}"
    row = sample.row
    prompt, answer = bounded(row.prompt, MAX_PROMPT_CHARS), bounded(conversation_text(row), MAX_TEXT_CHARS)
    prompt.stylize("dim")
    return Panel(Text.assemble(prompt, answer), title=Text(visible(title)), title_align="left", border_style="dim")


def rewards_text(rollout: Rollout) -> str:
    """The rewards by name, with the numbers of the turns where a function scores turns.

    >>> rewards = {"right": 1.5, "judge": None}
    >>> rewards_text(Rollout({}, 0, 0, 1.0, "", rewards=rewards, turn_rewards={"right": [1.0, 0.5]}))
    'right 1.5 (turns 1, 0.5), judge none'
    """
    shown = []
    for name, value in rollout.rewards.items():
        turns = ", ".join(f"{number:g}" for number in rollout.turn_rewards.get(name, ()))
        shown.append(f"{name} {'none' if value is None else f'{value:g}'}{f' (turns {turns})' if turns else ''}")
    return ", ".join(shown)


def conversation_text(row: Row) -> str:
    """The conversation of a row after its prompt. Each response of the environment is on a separate line.

    >>> conversation_text(Row("2 plus 2?", [], [], [], [], []))
    ''
    """
    said: list[str] = []
    num_turns = len(row.turns)
    for message in reversed(row.messages):
        if num_turns == 0:
            break
        is_turn = message["role"] == "assistant"
        num_turns -= is_turn
        said.insert(0, message["content"] if is_turn else f"\n[{message['role']}] {message['content']}\n")
    return "".join(said)
