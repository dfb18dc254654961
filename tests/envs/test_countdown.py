import time
from fractions import Fraction

import pytest

from envs.countdown import Countdown, correct, evaluate
from fuchsia_pl.envs import ConfigError
from tests.doubles import said

ITEM = {"numbers": [3, 25, 7, 4], "target": 96, "solution": "(25 - 4 + 3) * 4", "use_all": False}


def answer(text: str, **item):
    return said(f"<thinking>so</thinking><answer>{text}</answer>", {**ITEM, **item})


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("(25 + 7) * 3", 1.0),
        ("4 * (25 - 7 / 7)", 0.0),  # 7 twice
        ("25*4 - 7 + 3", 1.0),
        ("(25 - 4 + 3) * 4", 0.0),  # 4 twice
        ("96", 0.0),
        ("100 - 4", 0.0),
        ("25 * 4 - 3", 0.0),  # 97
        ("(25 + 7) * 3 = 96", 0.0),
        ("(25 + 7) * 3.0", 0.0),
        ("(25 + 7) * -3 * -1", 0.0),
        ("(25 + 7) * True * 3", 0.0),
        ("25 ** 1 * 4 - 7 + 3", 0.0),
        ("25 // 1", 0.0),
        ("(25 + 7) * 3 or 1", 0.0),
        ("(25 + 7)(3)", 0.0),
        ("[96][0]", 0.0),
        ("", 0.0),
    ],
)
def test_only_an_expression_of_the_numbers_with_the_exact_value_is_right(text, reward):
    assert correct([answer(text)]) == [reward]


def test_each_number_at_most_once_or_exactly_once():
    assert correct([answer("(25 + 7) * 3", use_all=True), answer("25*4 - 7 + 3", use_all=True)]) == [0.0, 1.0]
    twice = {"numbers": [2, 2], "target": 4}
    assert correct([answer("2 + 2", **twice), answer("2 * 2", **twice), answer("2 + 2 + 2 - 2", **twice)]) == [
        1.0,
        1.0,
        0.0,
    ]


def test_arithmetic_is_exact():
    # in floating point 1 / 49 * 49 is below 1
    assert evaluate("1 / 49 * 49") == (Fraction(1), [1, 49, 49])
    assert evaluate("1 / 3 + 1 / 3 + 1 / 3") == (Fraction(1), [1, 3] * 3)
    assert evaluate("7 / (3 - 3)") is None


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "(" * 10_000,
        "(" * 90 + ")" * 90,
        "\u0669 + \u0661",
        "\uff11 + \uff12",
        "1 + \x002",
        "1 +" * 400_000,
        "__import__('os').system('true')",
        "[].__class__",
        "lambda: 1",
        "1 if 1 else 2",
        "1j",
        "'a' * 9",
        "10001",
        "x",
        "1_0",
    ],
)
def test_hostile_answers_are_none_at_once(text):
    start = time.perf_counter()
    found = evaluate(text)
    assert time.perf_counter() - start < 0.5
    assert found is None or text == "1_0"  # Python reads it as 10, which is a number like any other
    assert correct([answer(text)]) == [0.0]


def test_every_item_is_solved_by_its_own_solution_and_none_is_on_both_sides():
    environment = Countdown(num_train=500, num_validation=50)
    items = [*environment.train_items(), *environment.validation_items()]
    assert len({(*sorted(item["numbers"]), item["target"]) for item in items}) == 550
    for item in items:
        assert correct([said(environment.gold_turns(item)[0], item)]) == [1.0]
        assert item["target"] not in item["numbers"]


def test_the_settings():
    environment = Countdown(num_numbers=3, largest=20, use_all=True, num_train=30, num_validation=7, format_weight=0.3)
    assert (len(environment.train_items()), len(environment.validation_items())) == (30, 7)
    assert all(len(item["numbers"]) == 3 and max(item["numbers"]) <= 20 for item in environment.train_items())
    assert environment.reward_weights == {"format": 0.3}
    assert "exactly once" in environment.messages(environment.train_items()[0])[1]["content"]
    assert "at most once" in environment.messages(ITEM)[1]["content"]
    assert "make 96" in environment.messages(ITEM)[1]["content"]
    with pytest.raises(ConfigError, match="num_numbers=9"):
        Countdown(num_numbers=9)
    with pytest.raises(ConfigError, match="different items exist with num_numbers=2 and largest=2"):
        Countdown(num_numbers=2, largest=2, num_train=50, num_validation=5)
