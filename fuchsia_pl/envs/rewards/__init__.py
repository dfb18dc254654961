"""Ready-made reward functions. Each is made by a call and has a name of its own in the logs."""

from fuchsia_pl.envs.rewards.judge import Judge
from fuchsia_pl.envs.rewards.math_answer import MathAnswer
from fuchsia_pl.envs.rewards.text import (
    exact_match,
    format_tags,
    last_between,
    last_turn,
    length_penalty,
    number_match,
    parse_number,
)

__all__ = [
    "Judge",
    "MathAnswer",
    "exact_match",
    "format_tags",
    "last_between",
    "last_turn",
    "length_penalty",
    "number_match",
    "parse_number",
]
