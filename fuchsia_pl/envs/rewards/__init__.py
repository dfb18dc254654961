"""Ready-made reward functions. Each is created by a call and has its own name in the logs."""

from fuchsia_pl.envs.golds import checks_gold
from fuchsia_pl.envs.rewards.judge import Judge
from fuchsia_pl.envs.rewards.matches import (
    answered_messages,
    exact_match,
    gold_problem,
    gold_text,
    last_answer,
    last_between,
    last_turn,
    number_match,
)
from fuchsia_pl.envs.rewards.math_answer import MathAnswer
from fuchsia_pl.envs.rewards.numbers import Amount, Scorer, parse_number, read_number, same_number
from fuchsia_pl.envs.rewards.reward_model import RewardModel
from fuchsia_pl.envs.rewards.reward_server import RewardServer
from fuchsia_pl.envs.rewards.text import format_tags, length_penalty
from fuchsia_pl.envs.rewards.wrappers import last_boxed, unwrapped

__all__ = [
    "Amount",
    "Judge",
    "MathAnswer",
    "RewardModel",
    "RewardServer",
    "Scorer",
    "answered_messages",
    "checks_gold",
    "exact_match",
    "format_tags",
    "gold_problem",
    "gold_text",
    "last_answer",
    "last_between",
    "last_boxed",
    "last_turn",
    "length_penalty",
    "number_match",
    "parse_number",
    "read_number",
    "same_number",
    "unwrapped",
]
