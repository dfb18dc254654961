"""Addition of two numbers: the smallest useful task. A minute of training shows whether the policy learns it.

item    {"a": 27, "b": 45}
prompt  What is 27 plus 45? Answer with a number.
gold    72
"""

import random
import re
from typing import Any

from fuchsia_pl.envs import ConfigError, Item, Message, Rollout, RolloutStatus, SingleTurnEnvironment
from fuchsia_pl.envs.rewards import checks_gold, last_turn, read_number

# Digits with the separators that people write: "1,072", "1 072", "1{,}072" and "7.5" are one number each.
GROUP_MARK = r"(?:\{,\}|,?\\[,!;: ]|[ \u00a0\u2007\u2009\u202f'\u2019_])(?=[0-9]{3}(?![0-9]))"
NUMBER = re.compile(rf"[-\u2212]?[0-9](?:(?:[0-9.,]|{GROUP_MARK})*[0-9])?")
MAX_CHARS = 30


def gold_problem(item: Item) -> str | None:
    """Describes the first of the two numbers that is not an int; None if both are."""
    wrong = [name for name in ("a", "b") if type(item[name]) is not int]
    return f"{wrong[0]!r} is no whole number: {item[wrong[0]]!r}" if wrong else None


@checks_gold(gold_problem)
def correct(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
    """1.0 if the last number of the answer is the sum."""
    return [1.0 if last_integer(last_turn(r)) == r.item["a"] + r.item["b"] else 0.0 for r in rollouts]


def ended(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
    """1.0 if a correct answer ended with a stop token and not at the token limit.

    A wrong answer gets no reward for its end. Advantages compare the completions of one group. If no completion is correct, a
    reward for the end would be the whole advantage, and the policy would learn empty answers before it learns to add.
    """
    finished = (r.status is not RolloutStatus.TRUNCATED for r in rollouts)
    return [right if done else 0.0 for right, done in zip(correct(rollouts), finished, strict=True)]


def last_integer(text: str) -> int | None:
    """The last number in a text. None if there is no number, or if it is too long or not an integer.

    >>> last_integer("27 plus 45 is 72."), last_integer("1 072"), last_integer("no idea"), last_integer("7.5")
    (72, 1072, None, None)
    """
    found = NUMBER.findall(text)
    number = read_number(found[-1]) if found and len(found[-1]) < MAX_CHARS else None
    return int(number.value) if number is not None and number.value.denominator == 1 else None


class Arithmetic(SingleTurnEnvironment):
    """Questions of the form "What is A plus B?".

    Pairs (A, B) and (B, A) are on the same side of the split: training never shows a held-out sum in the other order.

    Args:
        largest: The numbers are 1 to `largest`.
        num_validation: Number of held-out questions.
        ended_weight: Weight of the reward `ended`. The weight of `correct` is 1.0.

    Raises:
        ConfigError: `num_validation` is not between 1 and the number of pairs.
    """

    def __init__(self, largest: int = 99, num_validation: int = 64, ended_weight: float = 0.2) -> None:
        super().__init__()
        self.reward_functions = [correct, ended]
        self.reward_weights = {"ended": ended_weight}
        pairs = [(a, b) for a in range(1, largest + 1) for b in range(a, largest + 1)]
        if not 0 < num_validation < len(pairs):
            raise ConfigError(
                f"num_validation must be above 0 and below {len(pairs)}, the pairs up to {largest}, got {num_validation}"
            )
        rng = random.Random(0)  # the split does not depend on the seed of the run
        rng.shuffle(pairs)
        held_out, rest = pairs[:num_validation], pairs[num_validation:]
        self._validation: list[Item] = [{"a": a, "b": b} for a, b in (rng.sample(pair, 2) for pair in held_out)]
        both_ways = sorted({ordered for a, b in rest for ordered in ((a, b), (b, a))})
        self._train: list[Item] = [{"a": a, "b": b} for a, b in both_ways]

    def train_items(self) -> list[Item]:
        """Every ordered pair that is not held out."""
        return self._train

    def validation_items(self) -> list[Item]:
        """The held-out pairs, each in one order."""
        return self._validation

    def messages(self, item: Item) -> list[Message]:
        """The question."""
        return [{"role": "user", "content": f"What is {item['a']} plus {item['b']}? Answer with a number."}]

    def answer(self, rollout: Rollout) -> str | None:
        """The number that `correct` reads."""
        number = last_integer(last_turn(rollout))
        return None if number is None else str(number)
