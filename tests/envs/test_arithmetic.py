import pytest

from fuchsia_pl.envs import Rollout, RolloutStatus
from fuchsia_pl.envs.golds import bad_golds
from fuchsia_pl.library.arithmetic import Arithmetic, correct, ended, last_integer
from tests.doubles import written


def answered(text: str, a: int = 27, b: int = 45, status: RolloutStatus = RolloutStatus.COMPLETED) -> Rollout:
    rollout = Rollout({"a": a, "b": b}, item_index=0, sibling=0, temperature=1.0, prompt="")
    rollout.append(written(text))
    rollout.finish(status)
    return rollout


GROUP_MARKS = (" ", "\u202f", "\u00a0", "{,}", "\\,", "\\!", ",\\!", "'", "\u2019", "_")


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("72", 1.0),
        ("27 + 45 = 72.", 1.0),
        ("The answer is **72**", 1.0),
        ("72, or maybe 73", 0.0),
        ("-72", 0.0),
        ("7 2", 0.0),
        ("", 0.0),
        ("no number", 0.0),
        ("9" * 10_000, 0.0),
        ("\u0667\u0662", 0.0),
        ("\u221272", 0.0),
        ("1,072", 0.0),
        ("7.72", 0.0),
        *((f"1{mark}072", 0.0) for mark in GROUP_MARKS),
        ("72.0", 1.0),
        ("<think>72", 0.0),
        ("<think>72? no</think>I do not know", 0.0),
        ("<think>71? no</think>72", 1.0),
    ],
)
def test_only_the_last_integer_counts(text, reward):
    assert correct([answered(text)]) == [reward]


def test_ending_by_itself_is_worth_something_only_with_the_right_answer():
    truncated = RolloutStatus.TRUNCATED
    rollouts = [answered("72"), answered("72", status=truncated), answered("7"), answered("7", status=truncated)]
    assert ended(rollouts) == [1.0, 0.0, 0.0, 0.0]


def test_training_never_draws_a_held_out_pair_in_either_order():
    environment = Arithmetic()
    train = {(item["a"], item["b"]) for item in environment.train_items()}
    held_out = {(item["a"], item["b"]) for item in environment.validation_items()}
    assert len(held_out) == 64
    assert not train & (held_out | {(b, a) for a, b in held_out})
    assert len(train) + len(held_out | {(b, a) for a, b in held_out}) == 99 * 99


def test_the_split_and_the_settings(monkeypatch):
    assert Arithmetic().validation_items() == Arithmetic().validation_items()
    assert len(Arithmetic(num_validation=10).validation_items()) == 10
    assert max(item["a"] for item in Arithmetic(largest=5, num_validation=2).train_items()) == 5
    assert Arithmetic(ended_weight=0.7).reward_weights == {"ended": 0.7}
    with pytest.raises(ValueError, match="above 0 and below 15, the pairs up to 5, got 15"):
        Arithmetic(largest=5, num_validation=15)


def test_the_gold_answer_is_right_for_every_held_out_question():
    for item in Arithmetic().validation_items():
        assert correct([answered(str(item["a"] + item["b"]), **item)]) == [1.0]


def test_the_question():
    message = Arithmetic().messages({"a": 3, "b": 4})
    assert message == [{"role": "user", "content": "What is 3 plus 4? Answer with a number."}]


def test_an_item_that_would_end_a_run_is_found_before_it():
    items = [{"a": 1, "b": 2}, {"a": 1, "b": "2"}, {"a": 1.5, "b": 2}, {"a": None, "b": 2}, {"b": 2}]
    assert bad_golds(Arithmetic(), items, limit=4) == [
        "item 1: 'b' is no whole number: '2'",
        "item 2: 'a' is no whole number: 1.5",
        "item 3: 'a' is no whole number: None",
        "item 4: there is no field 'a'",
    ]


def test_digits_in_groups_are_one_number():
    assert [last_integer(f"it is 1{mark}072.") for mark in GROUP_MARKS[:-3]] == [1072] * 7
    assert [last_integer(f"it is 1{mark}072.") for mark in GROUP_MARKS[-3:]] == [None] * 3
    assert last_integer("27 45 72") == 72
    assert last_integer("1 072 456") == 1072456


def test_no_integer_is_none():
    assert last_integer("twelve") is None
