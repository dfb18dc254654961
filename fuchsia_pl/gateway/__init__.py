"""Agents that bring their own loop, and an endpoint for their OpenAI client."""

from fuchsia_pl.gateway.environment import AgentEnvironment, AgentSettings

__all__ = ["AgentEnvironment", "AgentSettings"]
