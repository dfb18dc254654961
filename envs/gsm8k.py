r"""Grade school mathematics (arXiv:2110.14168), answered after thinking.

item    {"question": "Natalia sold clips to 48 of her friends in April, …", "answer": "… 48/2 = <<48/2=24>>24 …\n#### 72"}
prompt  a system message that asks for <thinking>…</thinking> and <answer>…</answer>, and the question
gold    72: what stands behind "####" in the item's answer, without the commas, as in the official evaluation
"""

import re
from typing import Any

from fuchsia_pl.envs import ConfigError, Item, Message, Rollout, SingleTurnEnvironment
from fuchsia_pl.envs.rewards import format_tags, last_between, parse_number

# The official extraction, github.com/openai/grade-school-math, grade_school_math/dataset.py: ANS_RE and extract_answer.
OFFICIAL_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
SYSTEM = (
    "Solve the problem. Think step by step inside <thinking> and </thinking>, then give the answer as a bare number inside "
    "<answer> and </answer>."
)


def official_answer(solution: str) -> str:
    r"""The number behind "####", commas left out.

    Raises:
        ValueError: There is none.

    >>> official_answer("48 + 24 = 72 and so on.\n#### 1,072")
    '1072'
    """
    found = OFFICIAL_ANSWER.search(solution)
    if found is None:
        raise ValueError(f"a solution of GSM8K ends in '#### <number>', got {solution[-80:]!r}")
    return found.group(1).strip().replace(",", "")


def correct(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
    """1.0 where the last `<answer>` is the gold number: "1,072", "$1072" and "1072.00" are the same, "1072 clips" is none."""
    return [float(_is_right(r.completion, official_answer(r.item["answer"]))) for r in rollouts]


def number(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
    """1.0 where the last `<answer>` is a number, right or wrong."""
    answers = (last_between(r.completion, "answer") for r in rollouts)
    return [float(answer is not None and parse_number(answer) is not None) for answer in answers]


class GSM8K(SingleTurnEnvironment):
    """GSM8K with rewards for the form and for the answer.

    The form is easy and the answer is hard, so the form's rewards fade: from `initial_form_weight` each to `form_weight` over the
    first `ramp_steps` steps, while the answer's stays at 1. Without that, a policy that has the form wrong learns nothing at
    first, and one that has it right keeps being paid for it.

    Args:
        train_file: JSON lines with "question" and "answer", in place of the hub.
        validation_file: The same for the held-out split.
        dataset: The dataset on the hub.
        form_weight: Weight of `format` and of `number` in the end.
        initial_form_weight: Their weight at the first step.
        ramp_steps: Steps until then; 0 has the last weight from the start.
        num_validation: Held-out problems, from the start of the split; None takes all 1,319.

    Raises:
        ConfigError: A number is below 0.
    """

    def __init__(
        self,
        train_file: str | list[str] | None = None,
        validation_file: str | list[str] | None = None,
        dataset: str = "openai/gsm8k",
        form_weight: float = 0.1,
        initial_form_weight: float = 0.5,
        ramp_steps: int = 100,
        num_validation: int | None = 200,
    ) -> None:
        super().__init__(
            dataset=dataset,
            dataset_config="main",
            train_file=train_file,
            validation_file=validation_file,
            prompt_field="question",
        )
        if ramp_steps < 0 or (num_validation is not None and num_validation < 1):
            raise ConfigError(
                f"GSM8K takes ramp_steps of 0 or more and num_validation of 1 or more, got {ramp_steps} and {num_validation}"
            )
        self.reward_functions = [correct, format_tags("thinking", "answer"), number]
        self.reward_weights = {"format": form_weight, "number": form_weight}
        if ramp_steps:
            self.initial_reward_weights = {"format": initial_form_weight, "number": initial_form_weight}
        self.ramp_steps = ramp_steps
        self.num_validation = num_validation

    def validation_items(self) -> list[Item]:
        """The first rows of the held-out split."""
        rows = super().validation_items()
        return [rows[index] for index in range(min(len(rows), self.num_validation or len(rows)))]

    def messages(self, item: Item) -> list[Message]:
        """The request and the problem."""
        return [{"role": "system", "content": SYSTEM}, *super().messages(item)]

    def gold_turns(self, item: Item) -> list[str]:
        """The dataset's own solution, without its calculator notes."""
        solution = re.sub(r"<<[^>]*>>", "", item["answer"].partition("####")[0]).strip()
        return [f"<thinking>{solution}</thinking>\n<answer>{official_answer(item['answer'])}</answer>"]


def _is_right(completion: str, gold: str) -> bool:
    answer = last_between(completion, "answer")
    return answer is not None and parse_number(answer) is not None and parse_number(answer) == parse_number(gold)
