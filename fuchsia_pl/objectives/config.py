"""What is optimised, as a user sets it."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from fuchsia_pl.objectives.corrections import CorrectionMode, SamplerCorrection
from fuchsia_pl.objectives.kl import KLEstimator
from fuchsia_pl.objectives.presets import (
    GROUP_ADVANTAGES,
    PRESETS,
    Advantage,
    LossType,
    Parts,
    RewardAggregation,
    Truncated,
)
from fuchsia_pl.objectives.reductions import Reduction
from fuchsia_pl.objectives.surrogates import RatioLevel, Surrogate
from fuchsia_pl.types import ConfigError, ServedModel

# Parts that say nothing beside one of these surrogates.
WITHOUT_EFFECT: dict[Surrogate, tuple[str, ...]] = {
    "reinforce": ("clip_low", "clip_high", "dual_clip", "ratio_level"),
    "cispo": ("dual_clip",),
    "sapo": ("clip_low", "clip_high", "dual_clip"),
    "clip": (),
}


@dataclass
class CriticSettings:
    """The critic of `advantage: gae`.

    Attributes:
        gamma: Discount per sampled token.
        lam: GAE's lambda: 1 trusts the rewards alone, 0 the critic alone.
        whiten: Advantages less their mean over the step's tokens, divided by their standard deviation.
        value_clip: Distance the value moves from the old one before the loss stops pulling.
        value_weight: Weight of the critic's loss beside the policy's.
    """

    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    value_clip: float = 0.2
    value_weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what is no discount or no weight."""
        for name, value in {"gamma": self.gamma, "lam": self.lam}.items():
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"model.loss.critic.{name} must be at least 0 and at most 1, got {value}")
        for name, value in {"value_clip": self.value_clip, "value_weight": self.value_weight}.items():
            if value <= 0.0:
                raise ConfigError(f"model.loss.critic.{name} must be above 0, got {value}")


@dataclass
class LossConfig:
    """What is optimised: a preset, any part of it set otherwise, and the weights that no preset sets.

    Attributes:
        loss_type: The algorithm, by name; it decides every part below that is not set (`objectives/presets.py`).
        advantage: "reward" (no baseline), "group_mean", "group_norm" (mean and std), "leave_one_out", "batch_norm" (over the
            step's tokens), "group_mean_batch_norm", or "gae" (a critic).
        surrogate: "reinforce", "clip", "cispo" or "sapo".
        reduction: "token_mean" weighs tokens alike, "sequence_mean" completions alike, "constant" divides by a constant.
        clip_low: Distance of the ratio's lower bound from 1.
        clip_high: Distance of the ratio's upper bound from 1.
        dual_clip: Bound of the ratio of tokens with negative advantage.
        ratio_level: "token", "sequence" (GSPO) or "sequence_token" (GSPO-token).
        constant_length: What "constant" divides by beside the number of rows; None is the longest completion allowed.
        kl_estimator: "k1", "k2", "k3", or "k3_unbiased", whose gradient is that of the KL. Where only `kl_in` is set it is "k1"
            in the reward and "k3" in the loss: k1 in the loss and k3 in the reward hardly pull (`objectives/kl.py`).
        kl_in: Whether beta times the KL is added to the loss or taken from the reward.
        truncated: What becomes of truncated completions: "keep", "mask" (not trained on), "penalise" (DAPO's soft punishment
            of length, which counts as one more reward function, `overlong`).
        reward_aggregation: "sum_then_normalize" (GRPO), or "normalize_then_sum" (GDPO, arXiv:2601.05242): each reward function
            is normalised in its group, and the weighted sum over the step.
        max_refills: Times that groups without spread are replaced by other items (dynamic sampling); 0 keeps them.
        beta: Weight of the KL to the reference; with 0 the loss never runs the reference.
        entropy_weight: Weight of the entropy bonus, the mean entropy of the step's tokens.
        num_policy_updates: Optimizer steps that one phase of rollouts is used for, each with all of them. With LoRA dropout, the
            ratio of later steps has dropout above the line and none below.
        old_logprobs: Denominator of the ratio. "trainer": the policy's own logprobs before the first update. "sampler": the
            engine's, so that bounds also catch tokens on which the two disagree.
        sampler_correction: How losses are weighted where engine and trainer disagree.
        critic: Settings of `advantage: gae`.
        overlong_buffer: Length of the slope of `truncated: penalise`, as a share of the longest completion allowed.
        sapo_temperature_positive: SAPO's tau where the advantage is positive.
        sapo_temperature_negative: SAPO's tau elsewhere.
    """

    loss_type: LossType = "grpo"
    advantage: Advantage | None = None
    surrogate: Surrogate | None = None
    reduction: Reduction | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    ratio_level: RatioLevel | None = None
    constant_length: int | None = None
    kl_estimator: KLEstimator | None = None
    kl_in: Literal["loss", "reward"] | None = None
    truncated: Truncated | None = None
    reward_aggregation: RewardAggregation | None = None
    max_refills: int | None = None
    beta: float = 0.0
    entropy_weight: float = 0.0
    num_policy_updates: int = 1
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    sampler_correction: SamplerCorrection = field(default_factory=SamplerCorrection)
    critic: CriticSettings = field(default_factory=CriticSettings)
    overlong_buffer: float = 0.2
    sapo_temperature_positive: float = 1.0
    sapo_temperature_negative: float = 1.05

    def __post_init__(self) -> None:
        """Refuses bounds that turn the objective around, and settings that would do nothing.

        Raises:
            ConfigError: Naming the setting, its value and what is allowed.
        """
        _check_ranges(self)
        _check_combinations(self)

    @property
    def given(self) -> dict[str, Any]:
        """The parts that are set beside the preset's."""
        values = {name.name: self.__dict__[name.name] for name in fields(Parts)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def parts(self) -> Parts:
        """Every part: as set, else as in the preset. A KL that is moved takes the estimator of its new place with it.

        >>> LossConfig("dapo", clip_low=0.1).parts.clip_low, LossConfig("dapo").parts.reduction
        (0.1, 'token_mean')
        >>> LossConfig("grpo", kl_in="reward").parts.kl_estimator
        'k1'
        """
        moved = {} if self.kl_in is None else {"kl_estimator": "k1" if self.kl_in == "reward" else "k3"}
        return Parts(**{**asdict(PRESETS[self.loss_type]), **moved, **self.given})

    @property
    def correction_mode(self) -> CorrectionMode:
        """The mode of the sampler correction, once `old_logprobs` is known."""
        return self.sampler_correction.mode or ("truncate" if self.old_logprobs == "trainer" else "disabled")

    @property
    def needs_signals(self) -> bool:
        """Whether advantages need the trainer's word on the rollouts: the critic's values, or the KL in the reward."""
        return self.parts.advantage == "gae" or self.kl_in_reward

    @property
    def kl_in_reward(self) -> bool:
        """Whether rewards lose beta times the KL."""
        return self.beta > 0.0 and self.parts.kl_in == "reward"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss gains beta times the KL."""
        return self.beta > 0.0 and self.parts.kl_in == "loss"

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value in force, as plain data; taken as a config it gives the same objective.

        >>> LossConfig("rloo").resolved()["clip_low"] is None, LossConfig("rloo").resolved()["constant_length"]
        (True, 1)
        """
        parts = asdict(self.parts) | dict.fromkeys(WITHOUT_EFFECT[self.parts.surrogate])
        correction = {**asdict(self.sampler_correction), "mode": self.correction_mode}
        return {**asdict(self), **parts, "sampler_correction": correction}


class Learner:
    """What those who sample must know of those who learn.

    No dataclass: the CLI would look for its fields in the config, and it is linked from the module as a whole.

    Args:
        served_model: The model that engine and trainer share.
        loss: What is optimised.

    >>> from pathlib import Path
    >>> Learner(ServedModel("smollm2", "bfloat16", 16, resolve=Path), LossConfig("rloo")).loss.parts.advantage
    'leave_one_out'
    """

    def __init__(self, served_model: ServedModel, loss: LossConfig) -> None:
        self.served_model = served_model
        self.loss = loss


def _check_ranges(config: LossConfig) -> None:
    parts = config.parts
    numbers = {**asdict(config), **asdict(config.sampler_correction), **asdict(config.critic)}
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"model.loss has {name}={value}, which is no finite number")
    above_zero = {
        "clip_high": parts.clip_high,
        "sapo_temperature_positive": config.sapo_temperature_positive,
        "sapo_temperature_negative": config.sapo_temperature_negative,
    }
    for name, value in above_zero.items():
        if value <= 0.0:
            raise ConfigError(f"model.loss.{name} must be above 0, got {value}")
    for name, share in {"clip_low": parts.clip_low, "overlong_buffer": config.overlong_buffer}.items():
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"model.loss.{name} must be above 0 and at most 1, got {share}")
    if parts.dual_clip is not None and parts.dual_clip <= 1.0:
        raise ConfigError(f"model.loss.dual_clip must be above 1, got {parts.dual_clip}: the ratio starts at 1")
    if parts.constant_length is not None and parts.constant_length < 1:
        raise ConfigError(f"model.loss.constant_length must be 1 or more, got {parts.constant_length}")
    if parts.max_refills < 0:
        raise ConfigError(f"model.loss.max_refills must be 0 or more, got {parts.max_refills}")
    if config.num_policy_updates < 1:
        raise ConfigError(f"model.loss.num_policy_updates must be 1 or more, got {config.num_policy_updates}")
    if config.beta < 0.0:
        raise ConfigError(
            f"model.loss.beta must be 0 or more, got {config.beta}: a negative weight rewards drifting away"
        )
    if config.entropy_weight < 0.0:
        raise ConfigError(
            f"model.loss.entropy_weight must be 0 or more, got {config.entropy_weight}: a negative weight rewards certainty"
        )


def _check_combinations(config: LossConfig) -> None:
    parts = config.parts
    idle = [name for name in WITHOUT_EFFECT[parts.surrogate] if name in config.given]
    if idle:
        raise ConfigError(f'model.loss.{idle[0]} does nothing with surrogate "{parts.surrogate}": leave it out')
    if config.constant_length is not None and parts.reduction != "constant":
        raise ConfigError(f'model.loss.constant_length does nothing with reduction "{parts.reduction}": leave it out')
    if parts.surrogate == "reinforce" and config.old_logprobs == "sampler":
        raise ConfigError(
            'model.loss.old_logprobs does nothing with surrogate "reinforce", which has no ratio: leave it out'
        )
    if parts.surrogate == "reinforce" and config.num_policy_updates > 1:
        raise ConfigError(
            f"model.loss.num_policy_updates={config.num_policy_updates} needs a surrogate with a ratio: the second update of "
            '"reinforce", which has none, would be biased. Set 1, or surrogate: "clip"'
        )
    if config.old_logprobs == "sampler" and config.correction_mode != "disabled":
        raise ConfigError(
            f'model.loss.sampler_correction.mode is "{config.correction_mode}" and old_logprobs "sampler", whose ratio holds the '
            "mismatch already: it would be corrected twice. Set one of them otherwise"
        )
    if parts.kl_estimator == "k3_unbiased" and parts.kl_in == "reward":
        raise ConfigError(
            'model.loss.kl_estimator "k3_unbiased" is about a gradient, and a KL in the reward has none: use "k1"'
        )
    if parts.max_refills > 0 and parts.advantage not in GROUP_ADVANTAGES:
        raise ConfigError(
            f'model.loss.max_refills={parts.max_refills} replaces groups without spread, and with advantage "{parts.advantage}" '
            "these teach as well as others: set it to 0"
        )
    if parts.reward_aggregation == "normalize_then_sum" and parts.advantage != "group_norm":
        raise ConfigError(
            'model.loss.reward_aggregation "normalize_then_sum" normalises each reward function in its group: it needs '
            f'advantage "group_norm", got "{parts.advantage}"'
        )
    if parts.reward_aggregation == "normalize_then_sum" and config.kl_in_reward:
        raise ConfigError(
            'model.loss.reward_aggregation "normalize_then_sum" has no total reward to take a KL from: set kl_in: loss'
        )
