import json

import pytest

from fuchsia_pl.envs import ConfigError
from fuchsia_pl.envs.thinking import ends_in_opening_mark, without_thinking
from fuchsia_pl.library.r1_zero import R1Zero
from fuchsia_pl.types import Completion, Turn
from tests.doubles import said

ITEM = {"problem": "What is {1} + $1$?", "answer": r"\frac{4}{2}", "solution": "It is two."}


@pytest.fixture(scope="module")
def forms():
    made = {form: R1Zero(form) for form in ("tags", "boxed")}
    yield made
    for environment in made.values():
        environment.reward_functions[0].close()


def after_the_prompt(text: str):
    """A turn after a prompt that ends with the opening mark of thinking."""
    rollout = said("", ITEM)
    answer = without_thinking(text, starts_in_thinking=True)
    rollout.turns = [Turn(Completion((1,), (-0.1,), "stop", None, 0), text, text, answer, answer)]
    return rollout


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("so</think> <answer>2</answer>", 1.0),
        ("so</think> <answer>\\boxed{2}</answer>", 1.0),
        ("so</think> <answer>3</answer>", 0.0),
        ("so <answer>2</answer>", 0.0),  # still inside the thinking
        ("so</think> 2", 0.0),
        ("", 0.0),
    ],
)
def test_the_answer_is_in_tags_after_the_thinking(forms, text, reward):
    assert forms["tags"].reward_functions[0]([after_the_prompt(text)]) == [reward]


@pytest.mark.parametrize(("text", "reward"), [(r"so \boxed{2}", 1.0), (r"so \boxed{3}", 0.0), ("nothing", 0.0)])
def test_the_answer_is_in_a_box(forms, text, reward):
    assert forms["boxed"].reward_functions[0]([said(text, ITEM)]) == [reward]


def test_the_gold_turn_earns_the_reward_in_both_forms(forms):
    assert forms["tags"].reward_functions[0]([after_the_prompt(forms["tags"].gold_turns(ITEM)[0])]) == [1.0]
    assert forms["boxed"].reward_functions[0]([said(forms["boxed"].gold_turns(ITEM)[0], ITEM)]) == [1.0]


def test_the_plain_template_ends_where_the_thinking_begins(forms):
    (message,) = forms["tags"].messages(ITEM)
    assert message["role"] == "user"
    assert "\nUser: What is {1} + $1$?\nAssistant: <think>" in message["content"]
    assert ends_in_opening_mark(message["content"])
    assert forms["tags"].stop == ["</answer>"]
    system, question = forms["boxed"].messages(ITEM)
    assert r"\boxed{}" in system["content"]
    assert question == {"role": "user", "content": ITEM["problem"]}
    assert forms["boxed"].stop == []


def test_the_settings(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(ITEM) for _ in range(3)))
    environment = R1Zero(train_file=str(file), validation_file=str(file), num_validation=2)
    assert (len(environment.train_items()), len(environment.validation_items())) == (3, 2)
    with pytest.raises(ConfigError, match=r"form of .*got 'box'"):
        R1Zero("box")
    with pytest.raises(ConfigError, match="num_validation of 1 or more, got 0"):
        R1Zero(num_validation=0)
