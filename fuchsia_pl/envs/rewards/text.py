"""Reward functions for the form and the length of the policy's text."""

from typing import Any

from fuchsia_pl.envs.rewards.matches import Reward, named
from fuchsia_pl.types import ConfigError, Rollout


def format_tags(*tags: str, name: str = "format") -> Reward:
    """Rewards a last turn that consists of `<a>…</a>`, `<b>…</b>`, … in this order, each once and not empty.

    reward = 1/2 (share of the opening and closing tags that occur exactly once) + 1/2 [the whole turn has the form]

    The whole turn is read, including its thinking: the tags may be the thinking marks.

    Args:
        tags: Names of the tags, in order.
        name: Name of the reward in logs.

    Raises:
        ConfigError: No tag is given.

    >>> from fuchsia_pl.types import Completion, Turn
    >>> rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="")
    >>> rollout.append(Turn(Completion((1,), (-0.1,), "stop", None, 0), "<answer>2</answer>", "", "<answer>2</answer>", ""))
    >>> format_tags("answer")([rollout]), format_tags("thinking", "answer")([rollout])
    ([1.0], [0.25])
    """
    if not tags:
        raise ConfigError("format_tags requires at least one tag")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]

    def reward(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
        turns = [rollout.turns[-1].text if rollout.turns else "" for rollout in rollouts]
        return [0.5 * _once(turn, marks) + 0.5 * _has_form(turn, marks) for turn in turns]

    return named(reward, name)


def length_penalty(free_tokens: int, max_tokens: int, name: str = "length") -> Reward:
    """0 up to `free_tokens` sampled tokens, then decreasing linearly to -1 at `max_tokens`; -1 beyond.

    Args:
        free_tokens: Number of tokens without a penalty.
        max_tokens: Number of tokens with the full penalty of 1.
        name: Name of the reward in logs.

    Raises:
        ConfigError: `free_tokens` is below 0, or not below `max_tokens`.
    """
    if not 0 <= free_tokens < max_tokens:
        raise ConfigError(f"length_penalty requires 0 <= free_tokens < max_tokens, got {free_tokens} and {max_tokens}")

    def reward(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
        over = [(r.num_sampled_tokens - free_tokens) / (max_tokens - free_tokens) for r in rollouts]
        return [-min(max(share, 0.0), 1.0) for share in over]

    return named(reward, name)


def _once(text: str, marks: list[str]) -> float:
    return sum(text.count(mark) == 1 for mark in marks) / len(marks)


def _has_form(text: str, marks: list[str]) -> bool:
    rest = text.strip()
    if any(rest.count(mark) != 1 for mark in marks):
        return False
    for opening, closing in zip(marks[::2], marks[1::2], strict=True):
        inside, closed, rest = rest.partition(closing)
        if not closed or not inside.startswith(opening) or not inside.removeprefix(opening).strip():
            return False
        rest = rest.lstrip()
    return not rest
