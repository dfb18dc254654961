import pytest

from envs.gsm8k import GSM8K, correct, number, official_answer
from fuchsia_pl.envs import ConfigError
from fuchsia_pl.envs.base import check_environment, weights_at
from tests.contracts.test_structure import ROOT
from tests.doubles import said

DATA = ROOT.parent / "shared" / "data" / "gsm8k"
ITEM = {"question": "How many?", "answer": "He has 48/2 = <<48/2=24>>24, and 48+24 = 72.\n#### 1,072"}


def answer(text: str):
    return said(f"<thinking>so</thinking><answer>{text}</answer>", ITEM)


@pytest.mark.skipif(not DATA.exists(), reason="the official files of GSM8K do not lie beside the checkout")
def test_the_gold_answer_of_every_row_earns_most_and_an_answer_beside_it_does_not():
    environment = GSM8K(str(DATA / "train.jsonl"), str(DATA / "test.jsonl"), num_validation=None)
    train, held_out = environment.train_items(), environment.validation_items()
    assert (len(train), len(held_out)) == (7473, 1319)
    for item in [*train, *held_out]:
        gold = said(environment.gold_turns(item)[0], item)
        gold.rewards = {f.__name__: f([gold])[0] for f in environment.reward_functions}
        assert gold.rewards == {"correct": 1.0, "format": 1.0, "number": 1.0}, item
        assert environment.is_correct(gold)
        official = official_answer(item["answer"])
        assert item["answer"].endswith(item["answer"].rpartition("#### ")[2])
        assert correct([said(f"<answer>{official}1</answer>", item), said(f"<answer>{official}.5</answer>", item)]) == [
            0,
            0,
        ]


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
        ("1 072", False),
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
    assert GSM8K(dataset="other/data")._sources["train"] == (None, "other/data", "main", "train")
