"""How rollouts are sampled."""

from dataclasses import dataclass
from typing import Literal

from fuchsia_pl.types import ConfigError


@dataclass
class SamplingConfig:
    """How rollouts are sampled.

    Attributes:
        group_size: Siblings of one item, compared with each other.
        temperature: Divides the logits, in the engine and in the loss.
        max_completion_tokens: Most tokens that the policy may write in a rollout, over all of its turns.
        max_length: Longest rollout: prompt, what the policy wrote, and what the environment answered.
        long_prompts: What a training item whose prompt leaves no room for `max_completion_tokens` does: "refuse" stops the run
            at its start, "drop" leaves such items out and counts them.
        validation_temperature: Temperature on the held-out split; 0 is greedy.
        top_p: Only here to say why not: the loss is of the whole distribution, so all of it must be sampled from.
        top_k: As top_p.
        min_p: As top_p.
    """

    group_size: int = 8
    temperature: float = 1.0
    max_completion_tokens: int = 256
    max_length: int = 1024
    long_prompts: Literal["refuse", "drop"] = "refuse"
    validation_temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what could not be sampled or learned from."""
        if self.group_size < 1:
            raise ConfigError(f"data.sampling.group_size must be 1 or more, got {self.group_size}")
        cut = {"top_p": (self.top_p, 1.0), "top_k": (self.top_k, 0), "min_p": (self.min_p, 0.0)}
        for name, (value, neutral) in cut.items():
            if value != neutral:
                raise ConfigError(
                    f"data.sampling.{name} must be {neutral}, got {value}: it would sample from a part of the distribution "
                    "that the loss is of. Lower the temperature instead, which the loss takes into account"
                )
        if self.temperature <= 0.0:
            raise ConfigError(
                f"data.sampling.temperature must be above 0, got {self.temperature}: greedy siblings are all alike"
            )
        if self.validation_temperature < 0.0:
            raise ConfigError(
                f"data.sampling.validation_temperature must be 0 or more, got {self.validation_temperature}"
            )
        if not 0 < self.max_completion_tokens < self.max_length:
            raise ConfigError(
                f"data.sampling.max_completion_tokens must be above 0 and below max_length={self.max_length}, "
                f"got {self.max_completion_tokens}: prompt and completion share max_length"
            )
