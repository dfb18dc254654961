import pytest

from fuchsia_pl.envs import SingleTurnEnvironment
from fuchsia_pl.envs.rewards import MathAnswer, exact_match, format_tags, last_answer, number_match
from fuchsia_pl.library.arithmetic import Arithmetic
from fuchsia_pl.library.gsm8k import correct_by
from tests.doubles import said


class Own(SingleTurnEnvironment):
    def __init__(self, *functions):
        super().__init__()
        self.reward_functions = list(functions)


FORM = format_tags("answer")


@pytest.mark.parametrize(
    ("functions", "text", "expected"),
    [
        ([FORM], "so <answer> x + 1 </answer>", "x + 1"),
        ([FORM], r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ([FORM], "<answer></answer>", None),
        ([FORM], "I do not know", None),
        ([FORM], "<think><answer>3</answer></think>no", None),
        ([FORM, number_match()], "<answer>3</answer>", "<answer>3</answer>"),  # it takes the whole turn
        ([number_match(extract=last_answer)], "<answer>$1,072.0</answer>", "1072"),
        ([number_match(extract=last_answer)], "1072", None),
        ([exact_match()], " yes ", "yes"),
        ([exact_match()], " ", None),
        ([correct_by("lenient")], "<thinking>4</thinking><answer>**72**</answer>", "72"),
    ],
)
def test_the_answer_is_what_the_first_reward_that_reads_one_reads(functions, text, expected):
    assert Own(*functions).answer(said(text)) == expected


def test_numbers_of_one_value_are_one_answer():
    answers = {Own(number_match()).answer(said(text)) for text in ("0.5", "1/2", "**0.50**", r"$\boxed{0.5}$")}
    assert answers == {"1/2"}


def test_answers_of_math_are_boxes():
    reward = MathAnswer()
    assert reward.answer(said(r"first \boxed{1}, then \boxed{x^2}")) == "x^2"
    assert reward.answer(said("It is 3.")) is None
    assert reward.answer(said(r"\boxed{1")) is None
    assert MathAnswer(extract=last_answer).answer(said("<answer>0.50</answer>")) == "1/2"


def test_arithmetic_answers_with_the_number_that_is_rewarded():
    assert Arithmetic().answer(said("27 plus 45 is 72.")) == "72"
    assert Arithmetic().answer(said("no idea")) is None
