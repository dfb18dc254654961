"""Reverse a short text, character by character: the task with which prime-rl tests its LoRA training.

item    {"prompt": "The cat sat."}
prompt  a system message that asks for the reversed text inside <reversed_text> tags, and the text
gold    <reversed_text>.tas tac ehT</reversed_text>
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from fuchsia_pl.envs import ConfigError, Item, Message, Rollout, SingleTurnEnvironment
from fuchsia_pl.envs.rewards import checks_gold, last_between, last_turn
from fuchsia_pl.envs.rows import first_rows, rows_after

TAG = "reversed_text"
SYSTEM = f"Reverse the text character-by-character. Put your answer in <{TAG}> tags."
# Bound of the comparison, whose time grows up to the cube of the length. A policy may write the worst case for a text.
MAX_CHARS = 400
TOO_LONG = "reversed_too_long"


def similarity(answer: str, gold: str) -> float:
    """2 M / T of two texts: M characters in common blocks, found from the longest block on, and T characters in both.

    It is the ratio of Python's difflib, as in prime-rl, but without its heuristic for texts of 200 characters or more, which
    leaves frequent characters out: a correct long answer may then score 0.

    >>> similarity("tac", "tac"), similarity("cat", "tac"), similarity("", "tac")
    (1.0, 0.3333333333333333, 0.0)
    """
    return SequenceMatcher(None, answer, gold, autojunk=False).ratio()


def gold_problem(item: Item) -> str | None:
    """Describes the fault of an item's text; None if it can be reversed and compared.

    >>> gold_problem({"prompt": ""}), gold_problem({"prompt": "abc"})
    ("'prompt' is no text: ''", None)
    """
    text = item["prompt"]
    if not isinstance(text, str) or not text.strip():
        return f"'prompt' is no text: {text!r}"
    if len(text) > MAX_CHARS:
        return f"'prompt' has {len(text)} characters, and at most {MAX_CHARS} are compared"
    return None


@checks_gold(gold_problem)
def reversed_text(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
    """The similarity of the last `<reversed_text>` outside the thinking to the reversed text; 0 without one.

    An answer of more than twice the text's length scores 0 and is counted as `reversed_too_long`: it could not exceed 2/3.
    """
    return [_score(rollout) for rollout in rollouts]


class ReverseText(SingleTurnEnvironment):
    """Texts to reverse.

    The dataset has a training split only. Without `validation_file`, its last `num_validation` rows are held out.

    Args:
        train_file: One or more local files with the field "prompt", instead of "PrimeIntellect/Reverse-Text-RL" on the hub.
        validation_file: The same for the held-out split.
        num_validation: Number of held-out texts.

    Raises:
        ConfigError: `num_validation` is below 1, or no training items are left.
    """

    def __init__(
        self,
        train_file: str | list[str] | None = None,
        validation_file: str | list[str] | None = None,
        num_validation: int = 64,
    ) -> None:
        super().__init__(
            dataset="PrimeIntellect/Reverse-Text-RL", train_file=train_file, validation_file=validation_file
        )
        if num_validation < 1:
            raise ConfigError(f"ReverseText takes num_validation of 1 or more, got {num_validation}")
        self.reward_functions = [reversed_text]
        self.counters = [TOO_LONG]
        self.num_validation = num_validation
        self._has_own_validation = validation_file is not None

    def train_items(self) -> Sequence[Item]:
        """The rows that are not held out."""
        rows = super().train_items()
        return rows if self._has_own_validation else first_rows(rows, self._num_train(rows))

    def validation_items(self) -> Sequence[Item]:
        """The first rows of the held-out file, or the last of the training rows."""
        if self._has_own_validation:
            return first_rows(super().validation_items(), self.num_validation)
        rows = super().train_items()
        return rows_after(rows, self._num_train(rows))

    def messages(self, item: Item) -> list[Message]:
        """The instruction and the text."""
        return [{"role": "system", "content": SYSTEM}, *super().messages(item)]

    def gold_turns(self, item: Item) -> list[str]:
        """The reversed text between its tags."""
        return [f"<{TAG}>{item['prompt'][::-1]}</{TAG}>"]

    def _num_train(self, rows: Sequence[Item]) -> int:
        if len(rows) <= self.num_validation:
            raise ConfigError(
                f"ReverseText holds out num_validation={self.num_validation} of {len(rows)} rows, which leaves none to train on"
            )
        return len(rows) - self.num_validation


def _score(rollout: Rollout) -> float:
    answer, gold = last_between(last_turn(rollout), TAG), str(rollout.item["prompt"])[::-1].strip()
    if answer is None:
        return 0.0
    if len(answer) > 2 * len(gold):
        rollout.counts[TOO_LONG] += 1
        return 0.0
    return similarity(answer, gold)
