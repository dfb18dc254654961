"""What the author of an environment imports."""

from fuchsia_pl.envs.base import Environment, RewardFunction, SingleTurnEnvironment, reward_name
from fuchsia_pl.types import ConfigError, Item, Message, Rollout, RolloutStatus

__all__ = [
    "ConfigError",
    "Environment",
    "Item",
    "Message",
    "RewardFunction",
    "Rollout",
    "RolloutStatus",
    "SingleTurnEnvironment",
    "reward_name",
]
