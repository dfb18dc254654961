"""The parts of an objective, and their values in each published algorithm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fuchsia_pl.objectives.credit import RewardAggregation
from fuchsia_pl.objectives.kl import KLEstimator
from fuchsia_pl.objectives.reductions import Reduction
from fuchsia_pl.objectives.surrogates import RatioLevel

LossType = Literal[
    "reinforce", "ppo", "grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "gspo", "cispo", "sapo", "gmpo"
]
Truncated = Literal["keep", "mask", "penalise"]


@dataclass(frozen=True)
class Parts:
    """The settings of a preset. Their meaning is described at `LossConfig`."""

    advantage: str
    surrogate: str
    reduction: Reduction
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio_level: RatioLevel = "token"
    constant_length: int | None = None
    kl_estimator: KLEstimator = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    truncated: Truncated = "keep"
    reward_aggregation: RewardAggregation = "sum_then_normalize"
    max_refills: int = 0


PRESETS: Mapping[LossType, Parts] = {
    # Williams 1992: reward times the gradient of the sequence's log probability, no baseline.
    "reinforce": Parts("reward", "reinforce", "constant", constant_length=1, kl_estimator="k1", kl_in="reward"),
    # arXiv:1707.06347 on group advantages; `advantage: gae` adds the critic.
    "ppo": Parts("group_norm", "clip", "token_mean"),
    # arXiv:2402.03300
    "grpo": Parts("group_norm", "clip", "sequence_mean"),
    # arXiv:2503.20783
    "dr_grpo": Parts("group_mean", "clip", "constant"),
    # arXiv:2503.14476
    "dapo": Parts("group_norm", "clip", "token_mean", clip_high=0.28, truncated="penalise", max_refills=3),
    # arXiv:2402.14740
    "rloo": Parts("leave_one_out", "reinforce", "constant", constant_length=1, kl_estimator="k1", kl_in="reward"),
    # arXiv:2501.03262
    "reinforce_pp": Parts("batch_norm", "clip", "token_mean", kl_estimator="k1", kl_in="reward"),
    # arXiv:2507.18071
    "gspo": Parts("group_norm", "clip", "sequence_mean", 3e-4, 4e-4, ratio_level="sequence"),
    # arXiv:2506.13585, with the upper bound of 5 of arXiv:2510.13786 and no lower bound
    "cispo": Parts("group_norm", "cispo", "token_mean", clip_low=1.0, clip_high=4.0),
    # arXiv:2511.20347
    "sapo": Parts("group_norm", "sapo", "sequence_mean"),
    # arXiv:2507.20673: ratios from e^-0.4 to e^0.4
    "gmpo": Parts("group_norm", "gmpo", "sequence_mean", clip_low=0.32968, clip_high=0.491825),
}
