"""Settings of sampling."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.credit import GROUP_ADVANTAGES
from fuchsia_pl.types import ConfigError

RECHECK_PHASES = 20


@dataclass
class CurriculumConfig:
    """Settings of drawing items by their success.

    Attributes:
        band: Lowest and highest success rate: of the items that are drawn as usual, or of a level that stays.
        by: "item" measures each item, and draws those inside of the band. "level" measures the level of each kind of items, see
            `Environment.difficulty`: above the band the next level is drawn, below it the one before.
        decay: Weight of the earlier rate when it is measured again; the new success has the rest.
        recheck_phases: Phases after which an item outside of the band is drawn again, so that it can come back; null: 20. At
            most a quarter of the drawn items are such, those that wait longest first. Only with `by: item`.
        success: A rollout is a success if its total reward is at least this, before a length penalty; null: if the environment
            counts it as correct, as in `rollout/accuracy`.
    """

    band: tuple[float, float] = (0.2, 0.8)
    by: Literal["item", "level"] = "item"
    decay: float = 0.5
    recheck_phases: int | None = None
    success: float | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that is not allowed."""
        low, high = self.band
        if not 0.0 <= low < high <= 1.0:
            raise ConfigError(
                f"data.sampling.curriculum.band must be two rates from 0 to 1, the lower one first, got {list(self.band)}"
            )
        if not 0.0 <= self.decay < 1.0:
            raise ConfigError(f"data.sampling.curriculum.decay must be at least 0 and below 1, got {self.decay}")
        if self.recheck_phases is not None and self.recheck_phases < 1:
            raise ConfigError(f"data.sampling.curriculum.recheck_phases must be 1 or more, got {self.recheck_phases}")
        if self.recheck_phases is not None and self.by == "level":
            raise ConfigError(
                f"data.sampling.curriculum.recheck_phases is {self.recheck_phases}, which has no effect with by: level: "
                "leave it out"
            )
        if self.success is not None and not math.isfinite(self.success):
            raise ConfigError(f"data.sampling.curriculum.success must be a finite number or null, got {self.success}")


@dataclass
class SamplingConfig:
    """Settings of sampling.

    Attributes:
        group_size: Siblings of one item, compared with each other.
        temperature: Divisor of the logits, in the engine and in the loss.
        max_completion_tokens: Most tokens that the policy may write in a rollout, over all of its turns.
        max_length: Longest rollout in tokens: prompt, the policy's turns, and the environment's responses.
        long_prompts: Training items whose prompts leave no room for `max_completion_tokens`: "refuse" stops the run at its
            start, "drop" leaves them out and counts them.
        validation_temperature: Temperature on the held-out split; 0 is greedy.
        validation_samples: Rollouts per held-out item, for pass@k and maj@k. More than 1 need a `validation_temperature` above 0.
        validation_max_completion_tokens: `max_completion_tokens` of the held-out split; None: the same.
        max_staleness: Optimizer steps by which sampling may run ahead of training, and by which the weights that sampled may be
            older than the trained weights. With 0, sampling and training alternate.
        engine_restarts: How often an engine whose processes end is started again with the newest weights. The phase is then
            sampled again with the same seeds. A server has a setting of its own.
        special_tokens_in_text: Whether the name of a control token (`<|im_end|>`, `<tool_call>`) in an item's text or in a tool's
            result becomes that token. By default it is text, which cannot end a turn or a block.
        in_flight: Rollouts in progress when new weights arrive: "finish" completes them first, "continue" continues them with
            the new weights.
        curriculum: Draws items by their measured success, see `CurriculumConfig`; null draws all items equally often.
    """

    group_size: int = 8
    temperature: float = 1.0
    max_completion_tokens: int = 256
    max_length: int = 1024
    long_prompts: Literal["refuse", "drop"] = "refuse"
    validation_temperature: float = 0.0
    validation_samples: int = 1
    validation_max_completion_tokens: int | None = None
    max_staleness: int = 0
    in_flight: Literal["finish", "continue"] = "finish"
    engine_restarts: int = 1
    special_tokens_in_text: bool = False
    curriculum: CurriculumConfig | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.group_size < 1:
            raise ConfigError(f"data.sampling.group_size must be 1 or more, got {self.group_size}")
        if self.max_staleness < 0:
            raise ConfigError(f"data.sampling.max_staleness must be 0 or more, got {self.max_staleness}")
        if self.engine_restarts < 0:
            raise ConfigError(f"data.sampling.engine_restarts must be 0 or more, got {self.engine_restarts}")
        if self.in_flight == "continue" and self.max_staleness == 0:
            raise ConfigError(
                'data.sampling.in_flight is "continue", and max_staleness is 0: no rollout is in flight when weights change. '
                "Set max_staleness to 1 or more, or leave in_flight out"
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
        self._check_validation()

    def _check_validation(self) -> None:
        number, limit = self.validation_samples, self.validation_max_completion_tokens
        if number < 1:
            raise ConfigError(f"data.sampling.validation_samples must be 1 or more, got {number}")
        if number > 1 and self.validation_temperature == 0.0:
            raise ConfigError(
                f"data.sampling.validation_samples is {number} and validation_temperature is 0: greedy samples are all alike. "
                "Set validation_temperature above 0, such as 1.0, or leave validation_samples out"
            )
        if limit is not None and not 0 < limit < self.max_length:
            raise ConfigError(
                "data.sampling.validation_max_completion_tokens must be above 0 and below "
                f"max_length={self.max_length}, got {limit}: prompt and completion share max_length"
            )

    @property
    def held_out(self) -> "SamplingConfig":
        """The settings of the held-out split, with its own limit of tokens."""
        limit = self.validation_max_completion_tokens
        return self if limit is None else replace(self, max_completion_tokens=limit)


def check_sizes(loss: LossConfig, sampling: SamplingConfig, batch_size: int, steps_per_epoch: int) -> None:
    """Checks that sizes fit together.

    Args:
        loss: The objective.
        sampling: How rollouts are sampled.
        batch_size: Items of a phase of rollouts.
        steps_per_epoch: Optimizer steps of an epoch.

    Raises:
        ConfigError: One is below 1 or does not fit the objective.
    """
    for name, value in {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch}.items():
        if value < 1:
            raise ConfigError(f"data.{name} must be 1 or more, got {value}")
    if steps_per_epoch % loss.steps_per_phase:
        raise ConfigError(
            f"data.steps_per_epoch={steps_per_epoch} is no multiple of the {loss.steps_per_phase} optimizer steps of a phase "
            f"(model.loss.mini_batches={loss.mini_batches} x num_policy_updates={loss.num_policy_updates}): an epoch would end "
            "within one"
        )
    if sampling.group_size < 2 and loss.parts.advantage in GROUP_ADVANTAGES:
        raise ConfigError(
            f"data.sampling.group_size must be 2 or more, got {sampling.group_size}: advantage "
            f'"{loss.parts.advantage}" compares siblings of one item'
        )
    if sampling.max_staleness % loss.steps_per_phase:
        raise ConfigError(
            f"data.sampling.max_staleness={sampling.max_staleness} is no multiple of the {loss.steps_per_phase} optimizer steps "
            f"of a phase (model.loss.mini_batches={loss.mini_batches} x num_policy_updates={loss.num_policy_updates}), after "
            "which the engine gets new weights"
        )
