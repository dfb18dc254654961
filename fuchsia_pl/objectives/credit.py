"""Credit assignment: rewards of a step -> an advantage at each sampled token and, with a critic, a target for its value.

Shape letters: N groups, G siblings of a group, R = N x G rollouts, T sampled tokens of the longest rollout.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fuchsia_pl.batch import TrainerSignals
from fuchsia_pl.objectives.advantages import (
    batch_norm_advantages,
    group_mean_advantages,
    group_norm_advantages,
    has_spread,
    leave_one_out_advantages,
    moments,
)
from fuchsia_pl.objectives.own import check_tensor, import_function, is_own, wrong_result
from fuchsia_pl.objectives.returns import gae, rewards_to_go
from fuchsia_pl.objectives.turns import at_tokens, differ_by_turn, sum_by_turn, turn_group_advantages, turn_returns
from fuchsia_pl.types import ConfigError

RewardAggregation = Literal["sum_then_normalize", "normalize_then_sum"]
OverRanks = Callable[[Tensor], Tensor]
# Advantages [R, T] and, with a critic, the targets of its values [R, T].
Credit = tuple[Tensor, Tensor | None]

# These compare a rollout with its siblings. A group needs at least two, and gets no advantages without spread.
GROUP_ADVANTAGES = frozenset({"group_mean", "group_norm", "leave_one_out", "turn_group", "group_mean_batch_norm"})
ADVANTAGES = (
    "reward",
    "group_mean",
    "group_norm",
    "leave_one_out",
    "turn_group",
    "batch_norm",
    "group_mean_batch_norm",
    "gae",
    "teacher",
)


@dataclass
class CriticSettings:
    """The critic of `advantage: gae`.

    Attributes:
        gamma: Discount per sampled token.
        lam: GAE's lambda: 1 uses the rewards alone, 0 the critic alone.
        whiten: Whether advantages are normalised by their mean and standard deviation over the step's tokens.
        value_clip: Distance from the old value at which the gradient of the value loss ends.
        value_weight: Weight of the critic's loss beside the policy's.
    """

    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    value_clip: float = 0.2
    value_weight: float = 1.0

    def __post_init__(self) -> None:
        """Raises ConfigError for a discount outside 0 to 1, or a weight that is not positive."""
        for name, value in {"gamma": self.gamma, "lam": self.lam}.items():
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"model.loss.critic.{name} must be at least 0 and at most 1, got {value}")
        for name, value in {"value_clip": self.value_clip, "value_weight": self.value_weight}.items():
            if value <= 0.0:
                raise ConfigError(f"model.loss.critic.{name} must be above 0, got {value}")


@dataclass(frozen=True)
class CreditSettings:
    """Settings that an advantage may read.

    Attributes:
        kl_weight: beta where the KL is in the reward, else 0.
        reward_aggregation: See `LossConfig`.
        critic: See `CriticSettings`.

    >>> CreditSettings().kl_weight
    0.0
    """

    kl_weight: float = 0.0
    reward_aggregation: RewardAggregation = "sum_then_normalize"
    critic: CriticSettings = field(default_factory=CriticSettings)


@dataclass(frozen=True)
class CreditInputs:
    """The rollouts of one step on one rank, as tensors. Row r is sibling r % G of group r // G.

    Attributes:
        rewards: Total rewards with length penalties, float64 [N, G]; NaN where a rollout was not scored.
        rewards_by_name: Value of each reward function, float64 [N, G]; NaN where it did not score.
        reward_weights: Weight of each reward function in the total; 1 where a name is missing.
        penalties: Length penalty in `rewards`, float64 [N, G], at most 0; NaN where a rollout was not scored.
        lengths: Number of sampled tokens, int64 [R].
        turn_ends: bool [R, T], True at the last token of each turn.
        turn_rewards: Weighted rewards of single turns at their last tokens, float64 [R, T], 0 elsewhere. They are parts of
            `rewards`; what they leave of a total belongs to the last token.
        trained: bool [R], True for rollouts that become rows of a batch.
        signals: Signals of the trainer [R, T]; each is None where the objective does not need it.
        settings: The settings.

    >>> rewards, none = torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2)
    >>> turn_ends = torch.tensor([[True, False], [False, True]])
    >>> signals, settings = TrainerSignals(None, None), CreditSettings()
    >>> inputs = CreditInputs(rewards, {}, {}, none, torch.tensor([1, 2]), turn_ends, torch.zeros(2, 2),
    ...     torch.tensor([True, True]), signals, settings)
    >>> inputs.mask.tolist()
    [[True, False], [True, True]]
    >>> group_mean(inputs)[0].abs().tolist()
    [[0.5, 0.0], [0.5, 0.5]]
    """

    rewards: Tensor
    rewards_by_name: Mapping[str, Tensor]
    reward_weights: Mapping[str, float]
    penalties: Tensor
    lengths: Tensor
    turn_ends: Tensor
    turn_rewards: Tensor
    trained: Tensor
    signals: TrainerSignals
    settings: CreditSettings

    @property
    def mask(self) -> Tensor:
        """Positions of sampled tokens, bool [R, T]."""
        return torch.arange(self.turn_ends.shape[1]) < self.lengths.unsqueeze(1)

    @property
    def kept(self) -> Tensor:
        """Positions of sampled tokens in trained rollouts, bool [R, T]."""
        return self.mask & self.trained.unsqueeze(1)

    @property
    def kl_cost(self) -> Tensor:
        """KL cost that is subtracted from each token's reward, float64 [R, T]; 0 where the KL is not in the reward."""
        if self.settings.kl_weight == 0.0:
            return torch.zeros(self.turn_ends.shape, dtype=torch.float64)
        assert self.signals.kl is not None, "a KL in the reward needs the trainer's signals"
        return self.settings.kl_weight * self.signals.kl.double()

    @property
    def token_rewards(self) -> Tensor:
        """Reward of each token, float64 [R, T]: of turns at their ends, the rest at the last token, less the KL's cost."""
        is_last = torch.arange(self.turn_ends.shape[1]) == (self.lengths - 1).unsqueeze(1)
        rest = self.rewards.reshape(-1, 1).nan_to_num(nan=0.0) - self.turn_rewards.sum(dim=1, keepdim=True)
        return torch.where(is_last, rest, 0.0) + self.turn_rewards - self.kl_cost

    @property
    def compared_rewards(self) -> Tensor:
        """Rewards for the comparison of siblings, float64 [N, G]: less the KL's cost, and without penalties of length alone."""
        return self.rewards - self.penalties_of_alike - self.kl_cost.sum(dim=1).reshape(self.rewards.shape)

    @property
    def penalties_of_alike(self) -> Tensor:
        """Length penalties of groups with otherwise equal siblings, 0 elsewhere; [N, G].

        The length alone must not give such siblings different advantages. DAPO drops these groups before it adds the penalty.
        """
        differs = has_spread(self.rewards - self.penalties).unsqueeze(1)
        return torch.where(differs, 0.0, self.penalties)

    def per_token(self, values: Tensor) -> Tensor:
        """Values of whole rollouts, [N, G] or [R], at each of their tokens; [R, T]."""
        return values.reshape(-1, 1) * self.mask


def assign_credit(advantage: str, inputs: CreditInputs, over_ranks: OverRanks) -> Credit:
    """Advantages and value targets of a step.

    Args:
        advantage: A name in `ADVANTAGES`, or the dotted path of a function with the arguments `inputs` and `over_ranks`.
        inputs: The step's rollouts.
        over_ranks: Sums a tensor over all ranks. Every rank must call it equally often.

    Returns:
        Advantages float64 [R, T], defined at sampled tokens only; and the targets, None without a critic.

    Raises:
        ConfigError: A user's function returns something else.
    """
    match advantage:
        case "reward":
            return reward(inputs)
        case "group_mean":
            return group_mean(inputs)
        case "group_norm":
            return group_norm(inputs, over_ranks)
        case "leave_one_out":
            return leave_one_out(inputs)
        case "turn_group":
            return turn_group(inputs)
        case "batch_norm":
            return batch_norm(inputs, over_ranks)
        case "group_mean_batch_norm":
            return group_mean_batch_norm(inputs, over_ranks)
        case "gae":
            return gae_credit(inputs, over_ranks)
        case "teacher":  # rewards give none; those of a teacher are added to the advantages of any kind
            return torch.zeros(inputs.turn_ends.shape, dtype=torch.float64), None
        case _:
            function = import_function("model.loss.advantage", advantage, ("inputs", "over_ranks"))
            return _check_credit(advantage, function(inputs, over_ranks), inputs)


def reward(inputs: CreditInputs) -> Credit:
    """Sum of the rewards from each token on, without a baseline."""
    return rewards_to_go(inputs.token_rewards, inputs.mask), None


def group_mean(inputs: CreditInputs) -> Credit:
    """Reward less the mean of the group."""
    return inputs.per_token(group_mean_advantages(inputs.compared_rewards)), None


def group_norm(inputs: CreditInputs, over_ranks: OverRanks) -> Credit:
    """Reward less the mean of the group, divided by its standard deviation.

    With "normalize_then_sum" (GDPO, arXiv:2601.05242) each reward function is normalised in its group, and their weighted sum
    over the step.
    """
    if inputs.settings.reward_aggregation == "sum_then_normalize":
        return inputs.per_token(group_norm_advantages(inputs.compared_rewards)), None
    # Normalised over all scored rollouts. Their mean is 0, so a group without spread keeps its advantage of 0.
    advantages = normalised(sum_of_normalised(inputs), ~inputs.rewards.isnan(), over_ranks)
    return inputs.per_token(advantages), None


def sum_of_normalised(inputs: CreditInputs) -> Tensor:
    """Each reward function normalised in its group, then the weighted sum with the length penalty as one more; [N, G]."""
    total = torch.zeros(inputs.rewards.shape, dtype=torch.float64)
    for name, values in inputs.rewards_by_name.items():
        total += inputs.reward_weights.get(name, 1.0) * group_norm_advantages(values)
    return total + group_norm_advantages(inputs.penalties - inputs.penalties_of_alike)


def leave_one_out(inputs: CreditInputs) -> Credit:
    """Reward less the mean of the other siblings."""
    return inputs.per_token(leave_one_out_advantages(inputs.compared_rewards)), None


def turn_group(inputs: CreditInputs) -> Credit:
    """Return from each turn on less the mean of the other siblings' returns, at each token of the turn.

    A length penalty belongs to the end of a rollout. It is left out where the siblings are otherwise equal in each turn.
    """
    shape, turn_ends = inputs.rewards.shape, inputs.turn_ends
    num_turns = turn_ends.sum(dim=1).reshape(shape)
    by_turn = sum_by_turn(inputs.turn_rewards, turn_ends).unflatten(0, shape)
    differs = differ_by_turn(turn_returns(inputs.rewards - inputs.penalties, by_turn, num_turns))
    totals = inputs.rewards - torch.where(differs.unsqueeze(1), 0.0, inputs.penalties)
    costs = sum_by_turn(inputs.kl_cost, turn_ends).unflatten(0, shape)
    returns = turn_returns(totals - costs.sum(dim=2), by_turn - costs, num_turns)
    return at_tokens(turn_group_advantages(returns).flatten(0, 1), turn_ends), None


def batch_norm(inputs: CreditInputs, over_ranks: OverRanks) -> Credit:
    """Sum of the rewards from each token on, normalised over the step's tokens."""
    return normalised(reward(inputs)[0], inputs.kept, over_ranks), None


def group_mean_batch_norm(inputs: CreditInputs, over_ranks: OverRanks) -> Credit:
    """Reward less the mean of the group, normalised over the step's tokens."""
    return normalised(group_mean(inputs)[0], inputs.kept, over_ranks), None


def gae_credit(inputs: CreditInputs, over_ranks: OverRanks) -> Credit:
    """Generalised advantages and value targets of the kept tokens. A rollout that is not kept has no token here."""
    settings, kept = inputs.settings.critic, inputs.kept
    assert inputs.signals.values is not None, "gae needs the critic's values"
    values = inputs.signals.values.double()
    estimates = gae(inputs.token_rewards, values, kept, settings.gamma, settings.lam)
    targets = torch.where(kept, estimates + values, 0.0)
    return (normalised(estimates, kept, over_ranks) if settings.whiten else estimates), targets


def normalised(values: Tensor, kept: Tensor, over_ranks: OverRanks) -> Tensor:
    """Values normalised over the kept ones of the step and all ranks; 0 elsewhere.

    Args:
        values: Any shape.
        kept: bool, the same shape.
        over_ranks: Sums a tensor over all ranks.
    """
    selected = values[kept]
    moved = batch_norm_advantages(selected, over_ranks(moments(selected)))
    return torch.zeros_like(values, dtype=torch.float64).masked_scatter(kept, moved)


class _ExampleRewards(defaultdict[str, Tensor]):
    """Example rewards by name. A config is parsed before the environment's names are known, so every name exists."""


def check_advantage(advantage: str, settings: CreditSettings) -> None:
    """Raises for an unknown advantage, and calls a user's own with an example of two groups of four.

    Raises:
        ConfigError: The name is unknown, or the function raises an exception or returns something else than a finite advantage
            per token and None.
    """
    if not is_own(advantage):
        if advantage not in ADVANTAGES:
            names = ", ".join(ADVANTAGES)
            raise ConfigError(
                f'model.loss.advantage must be one of {names}, or the dotted path of a function, got "{advantage}"'
            )
        return
    rewards = torch.tensor([[0.0, 1.0, 0.5, torch.nan], [1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    lengths = torch.tensor([1, 3, 2, 1, 2, 2, 3, 1])
    positions = torch.arange(3)
    signals = TrainerSignals(torch.full((8, 3), 0.01) if settings.kl_weight else None, None)
    inputs = CreditInputs(
        rewards,
        _ExampleRewards(rewards.clone, {"example": rewards}),
        {},
        torch.zeros_like(rewards).masked_fill(rewards.isnan(), torch.nan),
        lengths,
        positions == (lengths - 1).unsqueeze(1),
        torch.zeros(8, 3, dtype=torch.float64),
        ~rewards.isnan().flatten(),
        signals,
        settings,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            advantages, _ = assign_credit(advantage, inputs, lambda values: values)
    except ConfigError:
        raise
    except Exception as error:  # user code may raise anything
        raise wrong_result("model.loss.advantage", advantage, f"raised {type(error).__name__}: {error}") from error
    if not advantages[inputs.kept].isfinite().all():
        raise wrong_result(
            "model.loss.advantage", advantage, f"returned the advantages {advantages.tolist()}: they must be finite"
        )


def _check_credit(advantage: str, credit: object, inputs: CreditInputs) -> Credit:
    if not isinstance(credit, tuple) or len(credit) != 2 or credit[1] is not None:
        raise wrong_result(
            "model.loss.advantage", advantage, "must return advantages per token, and None for the targets of a critic"
        )
    return check_tensor("model.loss.advantage", advantage, "advantages", credit[0], inputs.turn_ends.shape), None
