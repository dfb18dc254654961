"""The answer that a rollout gives, for majority votes."""

from collections.abc import Sequence

from fuchsia_pl.envs.base import ANSWER, RewardFunction
from fuchsia_pl.envs.rewards.matches import last_answer, last_turn
from fuchsia_pl.envs.rewards.wrappers import last_boxed
from fuchsia_pl.types import Rollout


def stated_answer(rollout: Rollout, functions: Sequence[RewardFunction]) -> str | None:
    """The answer that the first of some reward functions reads that reads one; without such, the last `<answer>` or box.

    Args:
        rollout: A finished rollout.
        functions: The reward functions of its environment.
    """
    for function in functions:
        if hasattr(function, ANSWER):
            answer: str | None = getattr(function, ANSWER)(rollout)
            return answer or None
    text = last_turn(rollout)
    return last_answer(text) or last_boxed(text) or None
