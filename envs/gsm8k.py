r"""Grade school mathematics (GSM8K, arXiv:2110.14168) with visible thinking before the answer.

item    {"question": "Natalia sold clips to 48 of her friends in April, …", "answer": "… 48/2 = <<48/2=24>>24 …\n#### 72"}
prompt  a system message that requests <thinking>…</thinking> and <answer>…</answer>, and the question
gold    72: the text after "####" in the item's answer, without commas, as in the official evaluation

`GSM8KMarks` is the form of verl's baselines: no system message, and the answer after "####".
"""

import re
from collections.abc import Sequence
from typing import Any

from fuchsia_pl.envs import ConfigError, Item, Message, RewardFunction, Rollout, SingleTurnEnvironment
from fuchsia_pl.envs.rewards import Scorer, format_tags, last_answer, last_turn, number_match, parse_number
from fuchsia_pl.envs.rows import first_rows

# The official extraction, github.com/openai/grade-school-math, grade_school_math/dataset.py: ANS_RE and extract_answer.
OFFICIAL_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
SYSTEM = (
    "Solve the problem. Think step by step inside <thinking> and </thinking>, then give the answer as a bare number inside "
    "<answer> and </answer>."
)

MARKS_INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'


def official_answer(solution: str) -> str:
    r"""The number after "####", without commas.

    Raises:
        ValueError: The solution has no such number.

    >>> official_answer("48 + 24 = 72 and so on.\n#### 1,072")
    '1072'
    """
    found = OFFICIAL_ANSWER.search(solution)
    if found is None:
        raise ValueError(f"a solution of GSM8K ends in '#### <number>', got {solution[-80:]!r}")
    return found.group(1).strip().replace(",", "")


def correct_by(scorer: Scorer) -> RewardFunction:
    """The reward `correct`: 1.0 if the last `<answer>` outside the thinking is the gold number.

    Args:
        scorer: "lenient" accepts the usual spellings of a number ("1,072", "$1072", "**1072**", "1072 dollars"). "strict"
            accepts a bare number only ("1,072", "$1072"). Neither accepts "1072 clips" or "x = 1072".
    """
    return number_match("answer", last_answer, scorer=scorer, read_gold=official_answer)


correct = correct_by("lenient")


def number(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
    """1.0 if the last `<answer>` outside the thinking is a bare number, correct or not. The strict scorer requires one."""
    answers = (last_answer(last_turn(r)) for r in rollouts)
    return [float(answer is not None and parse_number(answer) is not None) for answer in answers]


class GSM8K(SingleTurnEnvironment):
    """GSM8K with rewards for the form and for the answer.

    The weights of the form's rewards, `format` and `number`, change linearly from `initial_form_weight` to `form_weight` over
    the first `ramp_steps` steps. The weight of `correct` is always 1. The form is easy and the answer is hard: with small
    weights from the start, a policy without the form gets almost no reward; with large ones to the end, the form dominates.

    Args:
        train_file: One or more local files with the fields "question" and "answer", instead of "openai/gsm8k" on the hub.
        validation_file: The same for the held-out split.
        form_weight: Weight of `format` and of `number` after the ramp.
        initial_form_weight: Their weight at the first step.
        ramp_steps: Length of the ramp in steps. With 0, the weight is `form_weight` from the start.
        num_validation: Number of held-out problems, from the start of the split. None: all 1,319.
        scorer: Spellings of the gold number that `correct` accepts, see `correct_by`.

    Raises:
        ConfigError: A number is out of range, or there is no such scorer.
    """

    def __init__(
        self,
        train_file: str | list[str] | None = None,
        validation_file: str | list[str] | None = None,
        form_weight: float = 0.1,
        initial_form_weight: float = 0.5,
        ramp_steps: int = 100,
        num_validation: int | None = 200,
        scorer: Scorer = "lenient",
    ) -> None:
        super().__init__(
            dataset="openai/gsm8k",
            dataset_config="main",
            train_file=train_file,
            validation_file=validation_file,
            prompt_field="question",
        )
        if ramp_steps < 0 or (num_validation is not None and num_validation < 1):
            raise ConfigError(
                f"GSM8K takes ramp_steps of 0 or more and num_validation of 1 or more, got {ramp_steps} and {num_validation}"
            )
        self.reward_functions = [correct_by(scorer), format_tags("thinking", "answer"), number]
        self.reward_weights = {"format": form_weight, "number": form_weight}
        if ramp_steps:
            self.initial_reward_weights = {"format": initial_form_weight, "number": initial_form_weight}
        self.ramp_steps = ramp_steps
        self.num_validation = num_validation

    def validation_items(self) -> Sequence[Item]:
        """The first rows of the held-out split."""
        rows = super().validation_items()
        return rows if self.num_validation is None else first_rows(rows, self.num_validation)

    def messages(self, item: Item) -> list[Message]:
        """The instructions and the problem."""
        return [{"role": "system", "content": SYSTEM}, *super().messages(item)]

    def gold_turns(self, item: Item) -> list[str]:
        """The solution of the dataset without its calculator annotations."""
        solution = re.sub(r"<<[^>]*>>", "", item["answer"].partition("####")[0]).strip()
        return [f"<thinking>{solution}</thinking>\n<answer>{official_answer(item['answer'])}</answer>"]


def last_marked(text: str) -> str | None:
    """The number after the last "####" of a text, without commas and dollar signs; None if there is none.

    >>> last_marked("#### 3, no, #### 1,072."), last_marked("72")
    ('1072', None)
    """
    found = OFFICIAL_ANSWER.findall(text.replace("$", ""))
    return found[-1].rstrip(".").replace(",", "") if found else None


class GSM8KMarks(SingleTurnEnvironment):
    """GSM8K as verl asks and scores it: an instruction after the question, and one reward for the number after "####".

    Args:
        train_file: One or more local files with the fields "question" and "answer", instead of "openai/gsm8k" on the hub.
        validation_file: The same for the held-out split.
        num_validation: Number of held-out problems, from the start of the split. None: all 1,319.

    Raises:
        ConfigError: `num_validation` is below 1.
    """

    def __init__(
        self,
        train_file: str | list[str] | None = None,
        validation_file: str | list[str] | None = None,
        num_validation: int | None = None,
    ) -> None:
        super().__init__(
            dataset="openai/gsm8k",
            dataset_config="main",
            train_file=train_file,
            validation_file=validation_file,
            prompt_field="question",
        )
        if num_validation is not None and num_validation < 1:
            raise ConfigError(f"GSM8KMarks takes num_validation of 1 or more, got {num_validation}")
        self.reward_functions = [number_match("answer", last_marked, scorer="strict", read_gold=official_answer)]
        self.num_validation = num_validation

    def validation_items(self) -> Sequence[Item]:
        """The first rows of the held-out split."""
        rows = super().validation_items()
        return rows if self.num_validation is None else first_rows(rows, self.num_validation)

    def messages(self, item: Item) -> list[Message]:
        """The problem and the instruction."""
        (question,) = super().messages(item)
        return [{**question, "content": f"{question['content']} {MARKS_INSTRUCTION}"}]

    def gold_turns(self, item: Item) -> list[str]:
        """The solution of the dataset without its calculator annotations."""
        return [re.sub(r"<<[^>]*>>", "", item["answer"])]
