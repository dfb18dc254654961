r"""Mathematics for a base model, by rewards alone: R1-Zero (arXiv:2501.12948) in the small form of arXiv:2503.20783.

item    {"problem": "What is $1+1$?", "answer": "2", "solution": "…"}   (MATH: 12,000 training problems and MATH-500)
prompt  the text of the R1 template around the problem, or a system message that asks for \boxed{}
gold    …</think> <answer>2</answer>, or … \boxed{2}
"""

from collections.abc import Sequence
from typing import Literal, get_args

from fuchsia_pl.envs import ConfigError, Item, Message, SingleTurnEnvironment
from fuchsia_pl.envs.rewards import MathAnswer, last_answer
from fuchsia_pl.envs.rows import first_rows

Form = Literal["tags", "boxed"]
# The template of DeepSeek-R1 (arXiv:2501.12948, table 1). Its last word starts the thinking.
BEFORE = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant first "
    "thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning process is "
    "enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>.\nUser: "
)
AFTER = "\nAssistant: <think>"
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


class R1Zero(SingleTurnEnvironment):
    r"""Problems with one reward, 1 for an answer that is mathematically equal to the gold answer. There is none for the form.

    Args:
        form: "tags" is the R1 template, a plain text that a base model continues (`model.policy.chat_template: none`); the answer
            is in `<answer>` tags, at which the turn ends. "boxed" is a system message and a question for the model's own chat
            template, as Qwen2.5-Math was trained with; the answer is in a box.
        train_file: One or more local files with the fields "problem", "answer" and "solution", instead of
            "nlile/hendrycks-MATH-benchmark" on the hub.
        validation_file: The same for the held-out split.
        num_validation: Number of held-out problems, from the start of the split. None: all 500.

    Raises:
        ConfigError: A number is out of range, or there is no such form.
    """

    def __init__(
        self,
        form: Form = "tags",
        train_file: str | list[str] | None = None,
        validation_file: str | list[str] | None = None,
        num_validation: int | None = None,
    ) -> None:
        super().__init__(
            dataset="nlile/hendrycks-MATH-benchmark",
            train_file=train_file,
            validation_file=validation_file,
            prompt_field="problem",
        )
        if form not in get_args(Form):
            raise ConfigError(f"R1Zero takes a form of {list(get_args(Form))}, got {form!r}")
        if num_validation is not None and num_validation < 1:
            raise ConfigError(f"R1Zero takes num_validation of 1 or more, got {num_validation}")
        self.form = form
        self.num_validation = num_validation
        self.reward_functions = [MathAnswer("answer", extract=last_answer if form == "tags" else None)]
        self.stop = ["</answer>"] if form == "tags" else []

    def validation_items(self) -> Sequence[Item]:
        """The first rows of the held-out split."""
        rows = super().validation_items()
        return rows if self.num_validation is None else first_rows(rows, self.num_validation)

    def messages(self, item: Item) -> list[Message]:
        """The problem in the chosen form."""
        (question,) = super().messages(item)
        if self.form == "boxed":
            return [{"role": "system", "content": BOXED}, question]
        return [{"role": "user", "content": f"{BEFORE}{question['content']}{AFTER}"}]

    def gold_turns(self, item: Item) -> list[str]:
        """The solution of the dataset, and its answer in the chosen form."""
        if self.form == "boxed":
            return [f"{item['solution']}\nThe answer is \\boxed{{{item['answer']}}}."]
        return [f"{item['solution']}</think> <answer>{item['answer']}</answer>"]
