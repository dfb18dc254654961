"""Settings of the objective."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from fuchsia_pl.objectives.corrections import CorrectionMode, SamplerCorrection
from fuchsia_pl.objectives.credit import (
    GROUP_ADVANTAGES,
    CreditSettings,
    CriticSettings,
    RewardAggregation,
    check_advantage,
)
from fuchsia_pl.objectives.kl import KLEstimator
from fuchsia_pl.objectives.own import is_own
from fuchsia_pl.objectives.presets import PRESETS, LossType, Parts, Truncated
from fuchsia_pl.objectives.reductions import Reduction
from fuchsia_pl.objectives.surrogates import (
    SURROGATE_SETTINGS,
    RatioLevel,
    SAPOSettings,
    SurrogateSettings,
    SurrogateSpec,
    check_surrogate,
    surrogate_spec,
)
from fuchsia_pl.types import ConfigError, ServedModel

OVERLONG_BUFFER = 0.2
# Surrogates that multiply the advantage by the ratio, and advantages that differ from token to token.
OF_RATIO = ("clip", "sapo")
OF_TOKENS = ("turn_group", "gae", "teacher")


@dataclass
class LossConfig:
    """The objective: a preset, settings that replace those of the preset, and weights that no preset sets.

    Attributes:
        loss_type: The algorithm, by name. It sets every part below that is not set (`objectives/presets.py`).
        advantage: "reward" (no baseline), "group_mean", "group_norm" (mean and std), "leave_one_out", "turn_group" (leave one out
            from each turn on), "batch_norm" (over the phase's tokens), "group_mean_batch_norm", "gae" (a critic), "teacher" (that
            of `data.teacher` alone; with any other kind it is added), or the dotted path of a function with the arguments of
            `objectives/credit.py: group_norm`.
        surrogate: "reinforce", "clip", "cispo", "sapo", "gmpo", or the dotted path of a function with the argument and the
            results of `objectives/surrogates.py: clip`.
        reduction: "token_mean" weighs tokens alike, "sequence_mean" completions alike, "constant" divides by a constant.
        clip_low: Distance of the ratio's lower bound from 1.
        clip_high: Distance of the ratio's upper bound from 1.
        dual_clip: Bound of the ratio of tokens with negative advantage.
        ratio_level: "token", "sequence" (GSPO) or "sequence_token" (GSPO-token).
        constant_length: Divisor of "constant" beside the number of rollouts; None is the longest completion allowed.
        kl_estimator: "k1", "k2", "k3", or "k3_unbiased", whose gradient is that of the KL. Where only `kl_in` is set it is "k1"
            in the reward and "k3" in the loss: k1 in the loss and k3 in the reward have almost no effect (`objectives/kl.py`).
        kl_in: Whether beta times the KL is added to the loss or subtracted from the reward.
        truncated: Treatment of truncated completions: "keep", "mask" (not trained on), "penalise" (DAPO's soft length penalty,
            which counts as one more reward function, `overlong`).
        reward_aggregation: "sum_then_normalize" (GRPO), or "normalize_then_sum" (GDPO, arXiv:2601.05242): each reward function
            is normalised in its group, and the weighted sum over the phase.
        max_refills: Number of times that groups without spread are replaced by other items (dynamic sampling); 0 keeps them.
        beta: Weight of the KL to the reference; with 0 the loss never runs the reference.
        entropy_weight: Weight of the entropy bonus, the mean entropy of the step's tokens.
        mini_batches: Number of optimizer steps into which the rollouts of a phase are split, each of which uses its share once.
            Each rank's part of `data.batch_size` must be a multiple of it. Above 1, the trainer computes its logprobs of all
            shares but the first before the first step, in one more forward.
        num_policy_updates: Passes over the rollouts of a phase, each of `mini_batches` optimizer steps. With LoRA dropout, the
            ratio of all steps but the first has dropout in the numerator and none in the denominator.
        old_logprobs: Denominator of the ratio. "trainer": the trainer's logprobs before the first update. "sampler": the
            engine's, so that bounds also act on tokens where the two differ.
        sampler_correction: Weights of the losses where engine and trainer differ.
        critic: Settings of `advantage: gae`.
        overlong_buffer: Length of the slope of `truncated: penalise`, as a share of the longest completion allowed.
        sapo: Settings of `surrogate: sapo`.
    """

    loss_type: LossType = "grpo"
    advantage: str | None = None
    surrogate: str | None = None
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
    mini_batches: int = 1
    num_policy_updates: int = 1
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    sampler_correction: SamplerCorrection = field(default_factory=SamplerCorrection)
    critic: CriticSettings = field(default_factory=CriticSettings)
    overlong_buffer: float = OVERLONG_BUFFER
    sapo: SAPOSettings = field(default_factory=SAPOSettings)

    def __post_init__(self) -> None:
        """Refuses bounds that reverse the objective, settings without an effect, and functions that do not fit.

        Raises:
            ConfigError: With the setting, its value and the allowed values.
        """
        _check_ranges(self)
        _check_surrogate_settings(self)
        _check_combinations(self)
        check_surrogate(self.parts.surrogate, self.surrogate_settings)
        check_advantage(self.parts.advantage, self.credit_settings)

    @property
    def given(self) -> dict[str, Any]:
        """The parts that replace those of the preset."""
        values = {name.name: self.__dict__[name.name] for name in fields(Parts)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def parts(self) -> Parts:
        """Every part: the value that is set, else that of the preset. If only `kl_in` is set, the estimator changes with it.

        >>> LossConfig("dapo", clip_low=0.1).parts.clip_low, LossConfig("dapo").parts.reduction
        (0.1, 'token_mean')
        >>> LossConfig("grpo", kl_in="reward").parts.kl_estimator
        'k1'
        """
        moved = {} if self.kl_in is None else {"kl_estimator": "k1" if self.kl_in == "reward" else "k3"}
        return Parts(**{**asdict(PRESETS[self.loss_type]), **moved, **self.given})

    @property
    def steps_per_phase(self) -> int:
        """Optimizer steps of a phase of rollouts.

        >>> LossConfig(mini_batches=4, num_policy_updates=2).steps_per_phase
        8
        """
        return self.mini_batches * self.num_policy_updates

    @property
    def correction_mode(self) -> CorrectionMode:
        """The mode of the sampler correction; its default depends on `old_logprobs`."""
        return self.sampler_correction.mode or ("truncate" if self.old_logprobs == "trainer" else "disabled")

    @property
    def needs_signals(self) -> bool:
        """Whether advantages need signals of the trainer: the critic's values, or the KL in the reward."""
        return self.parts.advantage == "gae" or self.kl_in_reward

    @property
    def compares_turns(self) -> bool:
        """Whether siblings with equal rewards may have advantages, because they got them in other turns.

        >>> LossConfig(advantage="turn_group").compares_turns, LossConfig(advantage="leave_one_out").compares_turns
        (True, False)
        """
        return self.parts.advantage == "turn_group" or is_own(self.parts.advantage)

    @property
    def shares_credit(self) -> bool:
        """Whether the gradient of each token's loss spreads over its row, so that all tokens of a row need the same advantage.

        A surrogate that multiplies the advantage by the ratio of the whole row has one gradient for the row.

        >>> LossConfig("gspo").shares_credit, LossConfig("gspo", ratio_level="sequence_token").shares_credit
        (True, False)
        """
        surrogate = self.parts.surrogate
        return surrogate == "gmpo" or (surrogate in OF_RATIO and self.parts.ratio_level == "sequence")

    @property
    def kl_in_reward(self) -> bool:
        """Whether beta times the KL is subtracted from the reward."""
        return self.beta > 0.0 and self.parts.kl_in == "reward"

    @property
    def kl_in_loss(self) -> bool:
        """Whether beta times the KL is added to the loss."""
        return self.beta > 0.0 and self.parts.kl_in == "loss"

    @property
    def surrogate_spec(self) -> SurrogateSpec:
        """The surrogate and the settings that it uses."""
        return surrogate_spec(self.parts.surrogate)

    @property
    def surrogate_settings(self) -> SurrogateSettings:
        """Settings that the surrogate receives."""
        parts = self.parts
        return SurrogateSettings(parts.clip_low, parts.clip_high, parts.dual_clip, self.sapo)

    @property
    def credit_settings(self) -> CreditSettings:
        """Settings that the advantage receives."""
        return CreditSettings(self.beta if self.kl_in_reward else 0.0, self.parts.reward_aggregation, self.critic)

    def resolved(self) -> dict[str, Any]:
        """Every setting with its effective value, as plain data. As a config, it gives the same objective.

        >>> LossConfig("rloo").resolved()["clip_low"] is None, LossConfig("rloo").resolved()["constant_length"]
        (True, 1)
        """
        parts = asdict(self.parts)
        parts |= dict.fromkeys((SURROGATE_SETTINGS & parts.keys()) - self.surrogate_spec.uses)
        correction = {**asdict(self.sampler_correction), "mode": self.correction_mode}
        return {**asdict(self), **parts, "sampler_correction": correction}


class Learner:
    """The model and the objective, as the data module receives them from the module.

    Not a dataclass: the CLI would look for its fields in the config, and it is linked from the module as a whole.

    Args:
        served_model: The model that engine and trainer share.
        loss: The objective.

    >>> from pathlib import Path
    >>> Learner(ServedModel("smollm2", "bfloat16", 16, resolve=Path), LossConfig("rloo")).loss.parts.advantage
    'leave_one_out'
    """

    def __init__(self, served_model: ServedModel, loss: LossConfig) -> None:
        self.served_model = served_model
        self.loss = loss


def _check_ranges(config: LossConfig) -> None:
    parts = config.parts
    nested = asdict(config.sampler_correction) | asdict(config.critic) | asdict(config.sapo)
    numbers = {**asdict(config), **nested}
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"model.loss has {name}={value}: it must be finite")
    if parts.clip_high <= 0.0:
        raise ConfigError(f"model.loss.clip_high must be above 0, got {parts.clip_high}")
    for name, share in {"clip_low": parts.clip_low, "overlong_buffer": config.overlong_buffer}.items():
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"model.loss.{name} must be above 0 and at most 1, got {share}")
    if parts.dual_clip is not None and parts.dual_clip <= 1.0:
        raise ConfigError(f"model.loss.dual_clip must be above 1, got {parts.dual_clip}: the ratio starts at 1")
    if parts.constant_length is not None and parts.constant_length < 1:
        raise ConfigError(f"model.loss.constant_length must be 1 or more, got {parts.constant_length}")
    if parts.max_refills < 0:
        raise ConfigError(f"model.loss.max_refills must be 0 or more, got {parts.max_refills}")
    for name, number in {"mini_batches": config.mini_batches, "num_policy_updates": config.num_policy_updates}.items():
        if number < 1:
            raise ConfigError(f"model.loss.{name} must be 1 or more, got {number}")
    if config.beta < 0.0:
        raise ConfigError(f"model.loss.beta must be 0 or more, got {config.beta}: a negative weight rewards a large KL")
    if config.entropy_weight < 0.0:
        raise ConfigError(
            f"model.loss.entropy_weight must be 0 or more, got {config.entropy_weight}: a negative weight rewards low entropy"
        )


def _check_surrogate_settings(config: LossConfig) -> None:
    name, spec = config.parts.surrogate, config.surrogate_spec
    is_set = dict.fromkeys(config.given, True)
    is_set |= {"old_logprobs": config.old_logprobs == "sampler", "sapo": config.sapo != SAPOSettings()}
    idle = [key for key in sorted(SURROGATE_SETTINGS - spec.uses) if is_set.get(key)]
    if idle:
        raise ConfigError(f'model.loss.{idle[0]} has no effect with surrogate "{name}": leave it out')
    if config.steps_per_phase > 1 and not spec.has_ratio:
        setting = "num_policy_updates" if config.num_policy_updates > 1 else "mini_batches"
        raise ConfigError(
            f'model.loss.{setting}={config.__dict__[setting]} needs a surrogate with a ratio: "{name}" has none, and '
            'its second update would be biased. Set 1, or surrogate: "clip"'
        )


def _check_combinations(config: LossConfig) -> None:
    parts = config.parts
    if config.constant_length is not None and parts.reduction != "constant":
        raise ConfigError(f'model.loss.constant_length has no effect with reduction "{parts.reduction}": leave it out')
    if config.old_logprobs == "sampler" and config.correction_mode != "disabled":
        raise ConfigError(
            f'model.loss.sampler_correction.mode is "{config.correction_mode}" and old_logprobs is "sampler", whose '
            "ratio contains the mismatch already: it would be corrected twice. Change one of them"
        )
    if parts.kl_estimator == "k3_unbiased" and parts.kl_in == "reward":
        raise ConfigError(
            'model.loss.kl_estimator "k3_unbiased" corrects a gradient, and a KL in the reward has none: use "k1"'
        )
    if parts.max_refills > 0 and parts.advantage not in GROUP_ADVANTAGES and not is_own(parts.advantage):
        raise ConfigError(
            f"model.loss.max_refills={parts.max_refills} replaces groups without spread, which have advantages like all others "
            f'with advantage "{parts.advantage}": set it to 0'
        )
    _check_teacher_alone(config)
    _check_shared_credit(config)
    _check_idle_settings(config)
    if parts.reward_aggregation == "normalize_then_sum" and parts.advantage != "group_norm":
        raise ConfigError(
            'model.loss.reward_aggregation "normalize_then_sum" normalises each reward function in its group: it needs '
            f'advantage "group_norm", got "{parts.advantage}"'
        )
    if parts.reward_aggregation == "normalize_then_sum" and config.kl_in_reward:
        raise ConfigError(
            'model.loss.reward_aggregation "normalize_then_sum" has no total reward to subtract a KL from: set kl_in: loss'
        )


def _check_shared_credit(config: LossConfig) -> None:
    """Refuses advantages of single tokens where all tokens of a row share one."""
    advantage = config.parts.advantage
    is_of_tokens = advantage in OF_TOKENS or (advantage in ("reward", "batch_norm") and config.kl_in_reward)
    if config.shares_credit and is_of_tokens:
        raise ConfigError(
            f'model.loss.advantage "{advantage}" differs from token to token of a row, and {shared_credit_words(config)}'
        )


def shared_credit_words(config: LossConfig) -> str:
    """Why the tokens of a row must have the same advantage, and what to change."""
    if config.parts.surrogate == "gmpo":
        return 'surrogate "gmpo" gives all of them the same credit: set surrogate: clip'
    return 'ratio_level "sequence" gives all of them the same credit: set ratio_level: sequence_token'


def _check_idle_settings(config: LossConfig) -> None:
    """Refuses settings of parts that are not used."""
    if config.critic != CriticSettings() and config.parts.advantage != "gae":
        raise ConfigError(
            f'model.loss.critic has no effect with advantage "{config.parts.advantage}": leave it out, or set advantage: gae'
        )
    if config.overlong_buffer != OVERLONG_BUFFER and config.parts.truncated != "penalise":
        raise ConfigError(
            f'model.loss.overlong_buffer has no effect with truncated "{config.parts.truncated}": leave it out, or set '
            "truncated: penalise"
        )


def _check_teacher_alone(config: LossConfig) -> None:
    """Refuses terms of the reward where rewards give no advantage."""
    idle = {'kl_in: reward (set "loss")': config.kl_in_reward}
    idle |= {'truncated: penalise (set "keep" or "mask")': config.parts.truncated == "penalise"}
    for setting, is_set in idle.items():
        if is_set and config.parts.advantage == "teacher":
            raise ConfigError(
                f'model.loss.advantage "teacher" uses no reward, so model.loss.{setting} has no effect: change one of them'
            )
