"""Separation of thinking and answers, by hand and with generated nestings."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuchsia_pl.envs.thinking import THINKING_MARKS, ends_in_thinking, without_thinking


@pytest.mark.parametrize(
    ("text", "answer", "is_open"),
    [
        ("4", "4", False),
        ("<think>3</think>4", "4", False),
        ("a<think>3</think>b<thinking>5</thinking>c", "abc", False),
        ("<think>3</thinking>4", "", True),  # closed by another kind's mark: not closed
        ("<think>I see <think> marks.</think>4", "4", False),
        ("<think>a<think>b</think>c</think>4", "4", False),
        ("<think>a</think>4<think>b</think>c</think>5", "45", False),
        ("3?</think>4", "4", False),
        ("4 <think>or", "4 ", True),
        ("<thinking>3<think></thinking>4", "4", False),
        ("<think", "<think", False),
        ("", "", False),
    ],
)
def test_answers_by_hand(text, answer, is_open):
    assert (without_thinking(text), ends_in_thinking(text)) == (answer, is_open)


def test_a_thinking_that_began_in_the_prompt():
    assert without_thinking("3?</think>4", starts_in_thinking=True) == "4"
    assert without_thinking("3? <think> again</think>4", starts_in_thinking=True) == "4"
    assert (without_thinking("4", starts_in_thinking=True), ends_in_thinking("4", starts_in_thinking=True)) == (
        "",
        True,
    )


def test_other_marks_and_none():
    text = "[THINK]3[/THINK]<think>4"
    assert without_thinking(text, [("[THINK]", "[/THINK]")]) == "<think>4"
    assert (without_thinking(text, []), ends_in_thinking(text, [], starts_in_thinking=True)) == (text, False)
    # marks with a common beginning are distinguished
    assert without_thinking("<a>1</a>2<ab>3</ab>4", [("<a", "</a>"), ("<ab>", "</ab>")]) == "24"


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "<think></think>", "<think>x</thinking>", "<", "</think><thinking>"]
)
def test_ten_megabytes_of_marks_take_less_than_a_second(piece):
    text = piece * (10_000_000 // len(piece))
    start = time.process_time()
    without_thinking(text)
    assert time.process_time() - start < 2.5  # 0.1 s to 0.8 s; quadratic time would be minutes


WORDS = st.sampled_from(["yes", " ", "thought", "<", ">", "/", "think", "\n"])
MARKS = st.sampled_from([mark for pair in THINKING_MARKS for mark in pair])


@given(st.lists(WORDS | MARKS, max_size=30), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=300)
def test_no_answer_holds_a_mark_and_nothing_is_added(pieces, starts):
    text = "".join(pieces)
    answer = without_thinking(text, starts_in_thinking=starts)
    rest = iter(text)
    assert all(character in rest for character in answer)  # the rest of the text, in order
    if not any(mark in text for pair in THINKING_MARKS for mark in pair) and not starts:
        assert answer == text


@given(
    st.lists(st.tuples(WORDS, st.text("abc<>/", max_size=6), st.sampled_from(THINKING_MARKS)), max_size=8), st.data()
)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_well_formed_thinking_leaves_the_rest_and_a_cut_inside_of_it_leaves_what_stood_before(parts, data):
    text, answer = "", ""
    for word, thought, (opening, closing) in parts:
        answer += word
        text += word + opening + thought + closing
        assert without_thinking(text) == answer
        cut = data.draw(st.integers(0, len(thought + closing) - 1))
        unfinished = text[: len(text) - len(thought + closing) + cut]
        assert (without_thinking(unfinished), ends_in_thinking(unfinished)) == (answer, True)
