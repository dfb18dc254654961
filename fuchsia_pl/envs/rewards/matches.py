"""Reward functions that compare the answer with the gold answer. The policy's text is never evaluated as code."""

import math
from collections.abc import Callable
from decimal import Decimal
from numbers import Rational, Real
from typing import Any, get_args

from fuchsia_pl.envs.base import ANSWER
from fuchsia_pl.envs.golds import checks_gold
from fuchsia_pl.envs.rewards.numbers import Amount, Scorer, read_number, same_number
from fuchsia_pl.envs.rewards.wrappers import unwrapped
from fuchsia_pl.types import ConfigError, Item, Message, Rollout

Reward = Callable[..., list[float]]
Extract = Callable[[str], str | None]


def last_between(text: str, tag: str) -> str | None:
    """The content of the last `<tag>…</tag>` in a text, stripped; None if there is none.

    >>> last_between("<answer>1</answer> no, <answer> 2 </answer>", "answer")
    '2'
    """
    before, closed, _ = text.rpartition(f"</{tag}>")
    _, opened, inside = before.rpartition(f"<{tag}>")
    return inside.strip() if closed and opened else None


def last_answer(text: str) -> str | None:
    """The content of the last `<answer>…</answer>` in a text, stripped; None if there is none.

    >>> last_answer("<answer>1</answer> no, <answer> 2 </answer>"), last_answer("2")
    ('2', None)
    """
    return last_between(text, "answer")


def last_turn(rollout: Rollout) -> str:
    """The answer: the text of the last turn without its thinking; "" if there is none."""
    return rollout.turns[-1].answer if rollout.turns else ""


def answered_messages(rollout: Rollout) -> list[Message]:
    """The conversation of a rollout without the policy's thinking: of each of its turns the answer. Roles and texts are copies.

    >>> from fuchsia_pl.types import Completion, Turn
    >>> rollout = Rollout({}, 0, 0, 1.0, "", messages=[{"role": "user", "content": "3+4?"}])
    >>> rollout.append(Turn(Completion((1,), (-0.1,), "stop", None, 0), "<think>3+4</think>7", "", "7", ""))
    >>> answered_messages(rollout)
    [{'role': 'user', 'content': '3+4?'}, {'role': 'assistant', 'content': '7'}]
    """
    answered, turns = [], list(rollout.turns)
    for message in reversed(rollout.messages):
        content = message["content"]
        if turns and message["role"] == "assistant" and content == turns[-1].text:
            content = turns.pop().answer
        answered.append({"role": message["role"], "content": content})
    return answered[::-1]


def exact_match(field: str = "answer", extract: Extract = str.strip, name: str = "correct") -> Reward:
    """1.0 if the extracted answer equals the item's field as a string, both stripped.

    Args:
        field: Field of the item with the gold answer.
        extract: Extracts the answer from the last turn without its thinking; returns None if there is none.
        name: Name of the reward in logs.

    Raises:
        ValueError: On a call, if an item's field is not a text or a number.
    """

    @checks_gold(lambda item: gold_problem(lambda: gold_text(item, field)))
    def reward(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
        answers = [(extract(last_turn(rollout)), gold_text(rollout.item, field)) for rollout in rollouts]
        return [float(answer is not None and answer.strip() == gold) for answer, gold in answers]

    return named(reward, name, lambda rollout: (extract(last_turn(rollout)) or "").strip() or None)


def number_match(
    field: str = "answer",
    extract: Extract = str.strip,
    name: str = "correct",
    scorer: Scorer = "lenient",
    read_gold: Callable[[str], str] = str.strip,
) -> Reward:
    """1.0 if the extracted answer is exactly the same number as the item's field.

    Args:
        field: Field of the item with the gold number, in any form that the lenient scorer supports.
        extract: Extracts the answer from the last turn without its thinking; returns None if there is none.
        name: Name of the reward in logs.
        scorer: "lenient" reads numbers in common notations, "strict" reads only bare numbers; see the table in
            `numbers.py`.
        read_gold: Extracts the number from the item's field.

    Raises:
        ConfigError: The scorer is unknown.
        ValueError: On a call, if an item's field is not a number.
    """
    if scorer not in get_args(Scorer):
        raise ConfigError(f"number_match requires a scorer of {list(get_args(Scorer))}, got {scorer!r}")

    @checks_gold(lambda item: gold_problem(lambda: gold_number(item, field, read_gold)))
    def reward(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
        answers = [(extract(last_turn(rollout)), gold_number(rollout.item, field, read_gold)) for rollout in rollouts]
        return [float(answer is not None and same_number(answer, gold, scorer)) for answer, gold in answers]

    return named(reward, name, lambda rollout: plain_answer(extract(last_turn(rollout)) or ""))


def gold_text(item: Item, field: str) -> str:
    """An item's gold answer as text, stripped.

    Raises:
        ValueError: It is missing, empty, or neither text nor a number.

    >>> gold_text({"answer": 1e-07}, "answer")
    '1e-07'
    """
    if field not in item:
        raise ValueError(f"there is no field {field!r}, the fields are {[str(key) for key in item][:10]}")
    gold = item[field]
    if isinstance(gold, list | tuple | set):
        raise ValueError(f"the gold answer {str(gold)[:80]} in {field!r} is a list, but a reward requires one answer")
    if isinstance(gold, bool) or not isinstance(gold, str | Real | Decimal):
        raise ValueError(f"the gold answer {str(gold)[:80]} in {field!r} is neither text nor a number")
    # An integer is always finite, and may be too large for a float.
    if not isinstance(gold, str | Rational) and not math.isfinite(gold):
        raise ValueError(f"the gold answer {gold} in {field!r} is not finite")
    try:
        text = str(gold).strip()
    except ValueError as error:  # Python does not convert integers of more than 4,300 digits to text
        raise ValueError(f"the gold answer in {field!r} is a number with too many digits: {error}") from error
    if not text:
        raise ValueError(f"the gold answer in {field!r} is empty")
    return text


def gold_number(item: Item, field: str, read_gold: Callable[[str], str]) -> Amount:
    """An item's gold answer as a number.

    Raises:
        ValueError: It is not a number.
    """
    gold = read_gold(gold_text(item, field))
    amount = read_number(gold)
    if amount is None:
        raise ValueError(f"the gold answer {gold[:80]!r} is not a number")
    return amount


def gold_problem(read: Callable[[], object]) -> str | None:
    """The message of the ValueError that reading a gold answer raises; None if it raises none."""
    try:
        read()
    except ValueError as error:
        return str(error)
    return None


def plain_answer(text: str) -> str | None:
    r"""An answer for a vote: a number by its value, any other text without the marks around it; None for an empty text.

    >>> plain_answer("1,072"), plain_answer(r"$\boxed{1/2}$"), plain_answer(" **x + 1** "), plain_answer(" ")
    ('1072', '1/2', 'x + 1', None)
    """
    amount = read_number(text)
    return (str(amount.value) if amount is not None else unwrapped(text).strip()) or None


def named(reward: Reward, name: str, read: Callable[[Rollout], str | None] | None = None) -> Reward:
    """Sets the name of a reward function in logs, and what reads the answer of a rollout; returns the function."""
    reward.__name__ = name
    if read is not None:
        setattr(reward, ANSWER, read)
    return reward
