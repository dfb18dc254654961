"""Public names for authors of environments."""

from fuchsia_pl.envs.base import (
    Environment,
    MultiTurnEnvironment,
    RewardFunction,
    SingleTurnEnvironment,
    reward_name,
)
from fuchsia_pl.envs.difficulty import Difficulty
from fuchsia_pl.envs.tool_environment import ToolEnvironment
from fuchsia_pl.envs.tools.convention import ToolConvention
from fuchsia_pl.envs.tools.spec import MCPServer, ToolCall, ToolResult, ToolServerError, ToolSpec, ToolStatus
from fuchsia_pl.types import ConfigError, Item, Message, Rollout, RolloutStatus, RunEndingConfigError

__all__ = [
    "ConfigError",
    "Difficulty",
    "Environment",
    "Item",
    "MCPServer",
    "Message",
    "MultiTurnEnvironment",
    "RewardFunction",
    "Rollout",
    "RolloutStatus",
    "RunEndingConfigError",
    "SingleTurnEnvironment",
    "ToolCall",
    "ToolConvention",
    "ToolEnvironment",
    "ToolResult",
    "ToolServerError",
    "ToolSpec",
    "ToolStatus",
    "reward_name",
]
