import time
from fractions import Fraction

import pytest

from fuchsia_pl.envs import ConfigError
from fuchsia_pl.envs.golds import bad_golds
from fuchsia_pl.library.countdown import Countdown, correct, evaluate
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
        ("(25 + 7) * 3 = 96", 1.0),
        ("(25 + 7) \u00d7 3", 1.0),
        ("(25 + 7) \u00d7 3 = 96.", 1.0),
        ("$(25 + 7) \\times 3$", 1.0),
        ("\\boxed{(25 + 7) \\cdot 3 = 96}", 1.0),
        ("**(25 + 7) * 3**", 1.0),
        ("-(4 \u2212 25\u00d74)", 0.0),  # 96, with 4 twice
        ("-7 + 25*4 + 3", 1.0),
        ("\u22127 + 25*4 + 3", 1.0),
        ("(25 + 7) * 3 = 97", 0.0),
        ("25 + 7 = 96", 0.0),
        ("(25 + 7) * 3 = 96 = 96", 0.0),
        ("(25 + 7) * 3 =", 0.0),
        ("(25 + 7) * 3 == 96", 0.0),
        ("= 96", 0.0),
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


def test_the_signs_that_people_write():
    assert evaluate("14 \u00f7 4 \u2212 1 \u00d7 2") == (Fraction(3, 2), [14, 4, 1, 2])
    assert evaluate("-4 + 3") == evaluate("\u22124 + 3 = \u22121".replace("\u2212", "-")) == (Fraction(-1), [4, 3])


def test_an_expression_that_was_only_thought_of_is_no_answer():
    assert correct([said("<thinking><answer>25*4 - 7 + 3</answer></thinking>No.", ITEM)]) == [0.0]
    assert correct([said("<thinking><answer>25*4 - 7 + 3</answer>", ITEM)]) == [0.0]
    assert correct([said("<thinking><answer>1</answer></thinking><answer>25*4 - 7 + 3</answer>", ITEM)]) == [1.0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"numbers": None}, "item 0: 'numbers' is no list of whole numbers: None"),
        ({"numbers": [1, "2"]}, "'numbers' is no list of whole numbers"),
        ({"target": 9.5}, "'target' is no whole number: 9.5"),
        ({"use_all": "no"}, "'use_all' is neither true nor false: 'no'"),
    ],
)
def test_an_item_that_would_end_a_run_is_found_before_it(changed, words):
    (found,) = bad_golds(Countdown(num_train=5, num_validation=5), [{**ITEM, **changed}, ITEM])
    assert words in found
    assert bad_golds(Countdown(num_train=5, num_validation=5), [{"numbers": [1]}]) == [
        "item 0: there is no field 'target'"
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
    assert time.perf_counter() - start < 10  # a power tower would take minutes
    assert found is None or text == "1_0"  # Python reads it as 10, an ordinary number
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
