"""Texts of a policy on the console: they neither control the terminal nor fill it."""

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fuchsia_pl.callbacks.console_text import bounded, completion_panel, shortened, visible
from tests.doubles import make_sample, written

HOSTILE = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\r",
    "\x07",
    "\x08",
    "\u202e",
    "\u2066",
    "\u2028",
    "\x9b2J",
    "\ud800",
    "\x00",
]


def shown(prompt: str, answer: str) -> str:
    sample = make_sample([1], [2], 1.0)
    sample.rollout.prompt = prompt
    sample.rollout.messages = [{"role": "user", "content": prompt}]
    sample.rollout.append(written(answer))
    sample.rollout.rewards.update({answer[:9]: 0.5, "none": None})
    file = io.StringIO()
    Console(file=file, width=80, force_terminal=True, color_system=None).print(completion_panel(sample))
    return file.getvalue()


def test_what_a_model_writes_is_never_read_as_markup():
    assert "[bold]not bold[/bold] [/red]" in shown("[bold]not bold[/bold] [/red]", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_cannot_move_the_cursor(text):
    printed = shown(f"a{text}b", f"c{text}d")
    assert all(char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in printed)
    escaped = text[0].encode("unicode_escape").decode()
    assert f"a{escaped}" in printed
    assert f"c{escaped}" in printed


@given(st.text(alphabet=st.characters(), max_size=60))
def test_no_text_has_a_character_that_controls_a_terminal(text):
    found = visible(text)
    assert all(
        char in "\n\t\u200c\u200d" or unicodedata.category(char)[0] != "C" or unicodedata.category(char) in ("Co", "Cn")
        for char in found
    )
    assert (
        visible("plain text, \u00e4\u4e2d\U0001f468\u200d\U0001f469\n")
        == "plain text, \u00e4\u4e2d\U0001f468\u200d\U0001f469\n"
    )


@given(st.text(alphabet="ab\n\x1b", max_size=400), st.integers(2, 100), st.integers(2, 9))
def test_a_long_text_loses_its_middle_and_the_note_counts_it(text, max_chars, max_lines):
    short = shortened(text, max_chars, max_lines)
    if short == text:
        assert len(text) <= max_chars
        return
    head, rest = short.split(" [… ")
    number, tail = rest.split(" characters …] ")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert len(head) + int(number) + len(tail) == len(text)
    assert len(head) + len(tail) <= max_chars
    assert len(head.splitlines()) + len(tail.splitlines()) <= max_lines


@pytest.mark.parametrize("text", ["x" * 10**6, "\n" * 10**6, "\x1b" * 10**6, "word " * 10**5])
def test_a_megabyte_takes_a_screen_and_no_time(text):
    assert len(shown(text, text).splitlines()) < 100
    assert len(bounded(text, 100).plain) < 150
