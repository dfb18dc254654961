import json
import time

import pytest

from fuchsia_pl.envs import ConfigError
from fuchsia_pl.envs.golds import bad_golds
from fuchsia_pl.envs.rows import place_of
from fuchsia_pl.library.reverse_text import MAX_CHARS, ReverseText, reversed_text, similarity
from tests.doubles import said

ITEM = {"prompt": "The cat sat."}


def tagged(text: str) -> str:
    return f"<reversed_text>{text}</reversed_text>"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (tagged(".tas tac ehT"), 1.0),
        (f"so: {tagged('x')} no, {tagged(' .tas tac ehT ')} done", 1.0),
        # 11 of 12 and 11 characters in one block: 22 / 23
        (tagged(".tas tac eh"), 22 / 23),
        # "The cat sat.": the longest common block with the gold text is " ", then nothing on either side is in order but "t"
        (".tas tac ehT", 0.0),
        (tagged(""), 0.0),
        ("", 0.0),
        (f"<think>{tagged('.tas tac ehT')}</think>no", 0.0),
        (tagged("zzzz"), 0.0),
    ],
)
def test_the_reward_is_the_similarity_to_the_reversed_text(text, reward):
    assert reversed_text([said(text, ITEM)]) == [pytest.approx(reward)]


def test_a_long_gold_text_earns_everything():
    """With difflib's default heuristic a text of 200 characters or more, all of them frequent, has similarity 0 to itself."""
    text = "abcdefghij" * 30
    assert similarity(text, text) == 1.0


def test_an_answer_of_more_than_twice_the_length_is_counted_and_costs_no_time():
    hostile = said(tagged(" e" * 200_000), {"prompt": "e e " * (MAX_CHARS // 4)})
    start = time.perf_counter()
    assert reversed_text([hostile]) == [0.0]
    assert time.perf_counter() - start < 1
    assert hostile.counts["reversed_too_long"] == 1
    fits = said(tagged("xxabc"), {"prompt": "cba"})
    assert reversed_text([fits]) == [pytest.approx(2 * 3 / 8)]
    assert not fits.counts


@pytest.mark.parametrize("piece", [" ", "e", "t i", "it ", "e "])
def test_the_worst_answers_to_a_text_are_scored_in_time(piece):
    text = ("it was the best of times, it was the worst of times, it was the age of wisdom " * 6)[:MAX_CHARS]
    start = time.perf_counter()
    reversed_text([said(tagged((piece * 2 * MAX_CHARS)[: 2 * MAX_CHARS]), {"prompt": text})])
    assert time.perf_counter() - start < 3  # a group of 16 has 60 s


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"text {n}"}) for n in range(10)))
    return file


def test_the_last_rows_are_held_out_and_keep_their_lines(file):
    environment = ReverseText(train_file=str(file), num_validation=3)
    train, held_out = environment.train_items(), environment.validation_items()
    assert [item["prompt"] for item in train] == [f"text {n}" for n in range(7)]
    assert [item["prompt"] for item in held_out] == ["text 7", "text 8", "text 9"]
    assert place_of(held_out, 1).endswith("line 9)")
    for item in [*train, *held_out]:
        assert reversed_text([said(environment.gold_turns(item)[0], item)]) == [1.0]
    assert environment.messages(train[0])[1]["content"] == "text 0"
    assert "<reversed_text> tags" in environment.messages(train[0])[0]["content"]


def test_a_file_of_its_own_is_held_out(file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a"}\n{"prompt": "b"}')
    environment = ReverseText(train_file=str(file), validation_file=str(other), num_validation=1)
    assert len(environment.train_items()) == 10
    assert [item["prompt"] for item in environment.validation_items()] == ["a"]


def test_what_cannot_be_held_out_or_compared_is_refused(file):
    with pytest.raises(ConfigError, match="num_validation=10 of 10 rows, which leaves none"):
        ReverseText(train_file=str(file), num_validation=10).train_items()
    with pytest.raises(ConfigError, match="num_validation of 1 or more, got 0"):
        ReverseText(num_validation=0)
    rows = [{"prompt": "a" * (MAX_CHARS + 1)}, {"prompt": " "}, {"prompt": 3}, ITEM]
    found = bad_golds(ReverseText(), rows)
    assert len(found) == 3
    assert f"'prompt' has {MAX_CHARS + 1} characters" in found[0]
