"""How rollouts are sampled."""

from dataclasses import dataclass

from fuchsia_pl.types import ConfigError


@dataclass
class SamplingConfig:
    """How rollouts are sampled.

    top_p, top_k, min_p and penalties are always neutral: the loss is computed for the distribution that was sampled from.

    Attributes:
        group_size: Siblings of one item, compared with each other.
        temperature: Divides the logits, in the engine and in the loss.
        max_completion_tokens: Longest completion.
        max_length: Longest prompt plus completion.
        validation_temperature: Temperature on the held-out split; 0 is greedy.
    """

    group_size: int = 8
    temperature: float = 1.0
    max_completion_tokens: int = 256
    max_length: int = 1024
    validation_temperature: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what could not be sampled or learned from."""
        if self.group_size < 2:
            raise ConfigError(
                f"data.sampling.group_size must be 2 or more, got {self.group_size}: an advantage compares siblings of one item"
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
