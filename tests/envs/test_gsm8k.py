import re
import time
from fractions import Fraction

import pytest

from fuchsia_pl.envs import ConfigError
from fuchsia_pl.envs.base import check_environment, weights_at
from fuchsia_pl.envs.golds import bad_golds
from fuchsia_pl.envs.rewards import read_number, same_number
from fuchsia_pl.library.gsm8k import GSM8K, GSM8KMarks, correct, number, official_answer
from tests.contracts.test_structure import ROOT
from tests.doubles import said

DATA = ROOT.parent / "shared" / "data" / "gsm8k"
ITEM = {"question": "How many?", "answer": "He has 48/2 = <<48/2=24>>24, and 48+24 = 72.\n#### 1,072"}


needs_data = pytest.mark.skipif(not DATA.exists(), reason="the official files of GSM8K do not lie beside the checkout")
OFFICIAL = re.compile(r"#### (\-?[0-9\.\,]+)")
SCORERS = {scorer: GSM8K(scorer=scorer).reward_functions[0] for scorer in ("strict", "lenient")}


@pytest.fixture(scope="module")
def golds():
    environment = GSM8K(str(DATA / "train.jsonl"), str(DATA / "test.jsonl"), num_validation=None)
    return [*environment.train_items(), *environment.validation_items()]


def answer(text: str):
    return said(f"<thinking>so</thinking><answer>{text}</answer>", ITEM)


@needs_data
def test_the_gold_answer_of_every_row_earns_most():
    environment = GSM8K(str(DATA / "train.jsonl"), str(DATA / "test.jsonl"), num_validation=None)
    train, held_out = environment.train_items(), environment.validation_items()
    assert (len(train), len(held_out)) == (7473, 1319)
    for item in [*train, *held_out]:
        gold = said(environment.gold_turns(item)[0], item)
        gold.rewards = {f.__name__: f([gold])[0] for f in environment.reward_functions}
        assert gold.rewards == {"correct": 1.0, "format": 1.0, "number": 1.0}, item
        assert environment.is_correct(gold)


def is_officially_correct(completion: str, item) -> bool:
    """As in github.com/openai/grade-school-math: the text after "####", without commas, compared as a string."""
    found = OFFICIAL.search(completion)
    return found is not None and found.group(1).strip().replace(",", "") == official_answer(item["answer"])


@needs_data
def test_both_scorers_agree_with_the_official_one_on_every_solution(golds):
    """The files contain no answers of models: each solution is scored against its own item and against the next one."""
    for item, other in zip(golds, [*golds[1:], golds[0]], strict=True):
        written = item["answer"].rpartition("#### ")[2]
        official = [is_officially_correct(item["answer"], asked) for asked in (item, other)]
        for scorer, text in (("strict", written), ("lenient", written), ("lenient", f"#### {written}")):
            rollouts = [said(f"<answer>{text}</answer>", asked) for asked in (item, other)]
            assert SCORERS[scorer](rollouts) == official, (item, other)


RIGHT = [
    *(
        "{}",
        "{}.",
        "{}.00",
        "+{}",
        "${}",
        "{}%",
        "\\boxed{{{}}}",
        "$\\boxed{{{}}}$",
        "**{}**",
        "${}$",
        "\\${}",
        "{} dollars",
    ),
    *(
        "\u00a3{}",
        "{}\u20ac",
        "= {}",
        "#### {}",
        "\\({}\\)",
        "`{}`",
        "\\text{{{}}}",
        "{} \\text{{ km}}",
        "$\\${}$",
        "{} euros",
    ),
]
WRONG = [
    *(
        "{}1",
        "1{}",
        "{}.5",
        "-{}",
        "\u2212{}",
        "{}e1",
        "{}/7",
        "{} 1/2",
        "{}0",
        "{}^2",
        "{}!",
        "{}...",
        "({})",
        "{}k",
        "x = {}",
    ),
    *(
        "{} or 1",
        "1 or {}",
        "about {}",
        "not {}",
        "{} clips",
        "{} thousand",
        "{} dozen",
        "${} million",
        "{} cents",
        "{} + 1",
    ),
    *(
        "2 * {}",
        "{}, 1",
        "{};",
        "{}\n{}",
        "{} {}",
        "0x{}",
        "{}_0",
        "[{}]",
        "<{}",
        "\\boxed{{{}",
        "\\boxed{{{}}} or \\boxed{{1}}",
    ),
]


@needs_data
def test_every_gold_number_in_every_dress_is_right_and_no_other_string_is(golds):
    """The score depends on the gold number alone, so each number is tried once. Forms that are correct by chance are skipped."""
    numbers = sorted({official_answer(item["answer"]) for item in golds})
    assert len(numbers) > 500
    for official in numbers:
        value = Fraction(official)
        digits = f"{int(value):,}"
        groups = [digits.replace(",", mark) for mark in (",", "{,}", ",\\!", " ")] if value >= 1000 else []
        right = [form.format(number) for form in RIGHT if value >= 0 or form != "+{}" for number in (official, *groups)]
        gold = read_number(official)
        assert [text for text in right if not same_number(text, gold, "lenient")] == []
        wrong = [form.format(official, official) for form in WRONG if value] + [
            str(value + 1),
            str(value - 1),
            str(value * 10 + 1),
        ]
        assert [text for text in wrong if same_number(text, gold, "lenient") or same_number(text, gold, "strict")] == []


def test_the_scorer_is_a_setting():
    rollouts = [answer(text) for text in ("1072", "**1072**", "\\boxed{1072}", "1 072", "1072 dollars", "1071")]
    assert (
        GSM8K().reward_functions[0](rollouts)
        == GSM8K(scorer="lenient").reward_functions[0](rollouts)
        == [1, 1, 1, 1, 1, 0]
    )
    strict = GSM8K(scorer="strict")
    assert strict.reward_functions[0](rollouts) == [1, 0, 0, 0, 0, 0]
    assert number(rollouts) == [1, 0, 0, 0, 0, 1]
    check_environment(strict)
    with pytest.raises(ConfigError, match="got 'loose'"):
        GSM8K(scorer="loose")


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<thinking>is it <answer>1072</answer>?</thinking>I do not know", 0.0),
        ("<thinking>is it <answer>1072</answer>?", 0.0),
        ("<think>is it <answer>1072</answer>?</think><answer>3</answer>", 0.0),
        ("<thinking><answer>3</answer>? no</thinking><answer>1072</answer>", 1.0),
    ],
)
def test_an_answer_that_was_only_thought_of_is_none(text, reward):
    assert correct([said(text, ITEM)]) == [reward]
    assert number([said(text, ITEM)]) == [float(text.endswith("</answer>"))]


def test_items_without_a_usable_gold_are_found_before_a_run():
    items = [ITEM, {"answer": None}, {"answer": "no number"}, {"question": "?"}, {"answer": "#### 1.2.3"}]
    assert bad_golds(GSM8K(), items, limit=4) == [
        "item 1: the gold answer None in 'answer' is neither text nor a number",
        "item 2: a solution of GSM8K ends in '#### <number>', got 'no number'",
        "item 3: there is no field 'answer', the fields are ['question']",
        "item 4: the gold answer '1.2.3' is not a number",
    ]


@needs_data
def test_all_golds_are_checked_in_a_few_seconds(golds):
    start = time.perf_counter()
    assert bad_golds(GSM8K(), golds) == []
    assert time.perf_counter() - start < 6  # about one on an idle machine


@pytest.mark.parametrize("text", ["1072", "1,072", " 1072 ", "$1072", "1072.", "1072.00", "+1072"])
def test_the_gold_number_in_whatever_dress_is_right(text):
    assert correct([answer(text)]) == [1.0]
    assert number([answer(text)]) == [1.0]


@pytest.mark.parametrize(
    ("text", "is_number"),
    [
        ("1071", True),
        ("1072.1", True),
        ("-1072", True),
        ("10,72", False),
        ("1,0 72", False),
        ("1072 clips", False),
        ("about 1072", False),
        ("1072 or 1073", False),
        ("x = 1072", False),
        ("1000 + 72", False),
        ("one thousand and seventy-two", False),
        ("\u0661\u0660\u0667\u0662", False),
        ("1072\x00", False),
        ("", False),
        ("(" * 10_000, False),
        ("9**9**9", False),
        ("1072" * 300_000, False),
    ],
)
def test_near_misses_are_wrong(text, is_number):
    assert correct([answer(text)]) == [0.0]
    assert number([answer(text)]) == [float(is_number)]


@pytest.mark.parametrize(
    "text", ["1072", "#### 1072", "<answer>1072", "1072</answer>", "<answer>1072</answer><answer>3</answer>"]
)
def test_a_number_that_is_not_in_the_last_answer_is_wrong(text):
    assert correct([said(text, ITEM)]) == [0.0]


def test_the_official_extraction():
    assert official_answer(ITEM["answer"]) == "1072"
    assert official_answer("#### -5.50") == "-5.50"
    with pytest.raises(ValueError, match="ends in '#### <number>', got 'no answer'"):
        official_answer("no answer")


def test_the_question_and_the_gold_turn():
    environment = GSM8K(train_file="x")
    system, user = environment.messages(ITEM)
    assert system["role"] == "system"
    assert "<thinking>" in system["content"]
    assert "<answer>" in system["content"]
    assert user == {"role": "user", "content": "How many?"}
    assert environment.gold_turns(ITEM) == [
        "<thinking>He has 48/2 = 24, and 48+24 = 72.</thinking>\n<answer>1072</answer>"
    ]


def test_the_forms_rewards_fade_and_the_answers_stays():
    environment = GSM8K(form_weight=0.1, initial_form_weight=0.5, ramp_steps=10)
    check_environment(environment)
    assert weights_at(environment, 0) == {"correct": 1.0, "format": 0.5, "number": 0.5}
    assert weights_at(environment, 5) == pytest.approx({"correct": 1.0, "format": 0.3, "number": 0.3})
    assert (
        weights_at(environment, 10) == weights_at(environment, None) == {"correct": 1.0, "format": 0.1, "number": 0.1}
    )
    constant = GSM8K(form_weight=0.2, ramp_steps=0)
    check_environment(constant)
    assert weights_at(constant, 0) == {"correct": 1.0, "format": 0.2, "number": 0.2}


def test_settings_out_of_range_are_refused_and_data_settings_are_used(tmp_path):
    with pytest.raises(ConfigError, match="got -1 and 200"):
        GSM8K(ramp_steps=-1)
    with pytest.raises(ConfigError, match="got 100 and 0"):
        GSM8K(num_validation=0)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "#### 1"}\n' * 5)
    environment = GSM8K(validation_file=str(file), num_validation=3)
    assert len(environment.validation_items()) == 3
    file.write_text('\n{"question": "a", "answer": "#### 1"}\n{"question": "a", "answer": "no"}\n{"question": "b"}')
    found = bad_golds(environment, GSM8K(validation_file=str(file), num_validation=2).validation_items())
    assert [problem.split(":")[0] for problem in found] == [f"item 1 ({file}, line 3)"]
    assert GSM8K()._sources["train"] == (None, "openai/gsm8k", "main", "train")


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("so\n#### 1,072", 1.0),
        ("so #### $1072.", 1.0),
        ("#### 3\nno\n#### 1072", 1.0),
        ("#### 1072\nno\n#### 3", 0.0),
        ("<think>#### 1072</think>3", 0.0),
        ("1072", 0.0),
        ("#### about 1072", 0.0),
        ("", 0.0),
    ],
)
def test_in_the_form_of_verl_the_answer_is_the_last_number_after_the_marks(text, reward):
    environment = GSM8KMarks()
    assert environment.reward_functions[0]([said(text, ITEM)]) == [reward]
    assert environment.reward_functions[0]([said(environment.gold_turns(ITEM)[0], ITEM)]) == [1.0]


def test_the_question_in_the_form_of_verl_has_the_instruction_and_no_system_message(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "How many?", "answer": "#### 1"}\n' * 3)
    environment = GSM8KMarks(str(file), str(file), num_validation=2)
    (message,) = environment.messages(environment.train_items()[0])
    assert message["content"] == 'How many? Let\'s think step by step and output the final answer after "####".'
    assert (len(environment.train_items()), len(environment.validation_items())) == (3, 2)
    with pytest.raises(ConfigError, match="num_validation of 1 or more, got 0"):
        GSM8KMarks(num_validation=0)
