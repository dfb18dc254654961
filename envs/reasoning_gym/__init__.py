"""The datasets of reasoning-gym as environments."""

from fuchsia_pl.library.reasoning_gym.entries import Task
from fuchsia_pl.library.reasoning_gym.environment import ReasoningGym

__all__ = ["ReasoningGym", "Task"]
