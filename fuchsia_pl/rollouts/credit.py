"""From scored rollouts to trainable rows: who is trained on, and with which advantage at each token.

Shape letters: N groups, G siblings, R = N x G rollouts, A sampled tokens of the longest rollout.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fuchsia_pl.batch import Batch, TrainerSignals
from fuchsia_pl.objectives.advantages import (
    batch_norm_advantages,
    group_mean_advantages,
    group_norm_advantages,
    has_spread,
    leave_one_out_advantages,
    moments,
)
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.presets import GROUP_ADVANTAGES, Advantage
from fuchsia_pl.objectives.returns import gae, rewards_to_go
from fuchsia_pl.objectives.rewards import overlong_penalty
from fuchsia_pl.rollouts.scoring import LARGEST, RewardError
from fuchsia_pl.types import Rollout, RolloutGroup, RolloutStatus, Sample

OVERLONG = "overlong"
OverRanks = Callable[[Tensor], Tensor]


def group_rewards(groups: Sequence[Sequence[Rollout]]) -> Tensor:
    """Total rewards, float64 [N, G], NaN where a rollout was not scored."""
    if not groups:
        return torch.zeros(0, 2, dtype=torch.float64)
    return torch.tensor(
        [[torch.nan if rollout.reward is None else rollout.reward for rollout in group] for group in groups],
        dtype=torch.float64,
    )


def make_groups(siblings: Sequence[Sequence[Rollout]]) -> list[RolloutGroup]:
    """Says of every group whether its rewards differ."""
    spread = has_spread(group_rewards(siblings)).tolist()
    return [RolloutGroup(tuple(group), differs) for group, differs in zip(siblings, spread, strict=True)]


def penalise_overlong(config: LossConfig, groups: Sequence[RolloutGroup], max_completion_tokens: int) -> None:
    """Adds the soft punishment of length to the rewards, where the objective has it, as a reward function `overlong`.

    It comes after the check for spread, as in DAPO: siblings that are all wrong do not differ by their length.
    """
    if config.parts.truncated != "penalise":
        return
    buffer_tokens = max(round(config.overlong_buffer * max_completion_tokens), 1)
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        rollout.rewards[OVERLONG] = None
        if rollout.reward is not None:
            length = torch.tensor(rollout.num_sampled_tokens)
            penalty = overlong_penalty(length, max_completion_tokens, buffer_tokens).item()
            rollout.rewards[OVERLONG] = penalty
            rollout.reward += penalty


def is_trained_on(config: LossConfig, rollout: Rollout) -> bool:
    """Whether a rollout becomes a row: it was scored, something was sampled, and it is not masked for being truncated."""
    masked = config.parts.truncated == "mask" and rollout.status is RolloutStatus.TRUNCATED
    return rollout.reward is not None and rollout.num_sampled_tokens > 0 and not masked


def changes_nothing(config: LossConfig, sample: Sample) -> bool:
    """Whether no weight would move by a row: its advantages are 0, and nothing else is asked of its tokens."""
    asked = config.kl_in_loss or config.entropy_weight > 0.0 or config.parts.advantage == "gae"
    return not asked and not any(sample.advantages)


def make_samples(
    config: LossConfig,
    groups: Sequence[RolloutGroup],
    weights: dict[str, float],
    signals: dict[int, TrainerSignals],
    over_ranks: OverRanks,
) -> list[Sample]:
    """Gives every sampled token its advantage, and leaves out the rollouts that are not trained on.

    A rollout that is masked for being truncated still counts in its siblings' mean and spread.

    Args:
        config: The objective.
        groups: This rank's groups.
        weights: Weight of each reward function by name, 1.0 where not given; needed for "normalize_then_sum".
        signals: Where `config.needs_signals`, what the trainer says of each rollout's sampled tokens, by `id(rollout)`.
        over_ranks: Adds a tensor up over all ranks. Every rank calls it equally often.

    Raises:
        RewardError: An advantage, or the target of a value, is no number that a batch can hold.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    advantages, targets = _token_advantages(config, groups, weights, signals, over_ranks)
    samples = []
    for row, rollout in enumerate(rollouts):
        if not is_trained_on(config, rollout):
            continue
        length = rollout.num_sampled_tokens
        own = advantages[row, :length].tolist()
        _check_bounds(rollout, own, signals.get(id(rollout)))
        if targets is None:
            samples.append(Sample(rollout, tuple(own)))
        else:
            values = signals[id(rollout)].values
            assert values is not None
            _check_bounds(rollout, targets[row, :length].tolist(), signals[id(rollout)])
            samples.append(Sample(rollout, tuple(own), tuple(values.tolist()), tuple(targets[row, :length].tolist())))
    return samples


def _check_bounds(rollout: Rollout, values: Sequence[float], signals: TrainerSignals | None) -> None:
    """Refuses what is made of finite rewards and is not finite itself, or not in a batch's float32."""
    endless = next((value for value in values if not abs(value) <= LARGEST), None)
    if endless is None:
        return
    parts = [f"{name} {value:g}" for name, value in rollout.rewards.items() if value is not None]
    if signals is not None and signals.kl is not None:
        parts.append(f"KL {float(signals.kl.sum()):g}")
    if signals is not None and signals.values is not None:
        parts.append(f"largest value of the critic {float(signals.values.abs().max()):g}")
    raise RewardError(
        f"an advantage of sibling {rollout.sibling} of item {rollout.item_index} is {endless:g}, from a total reward of "
        f"{rollout.reward:g} with the parts {', '.join(parts)}. Advantages must be finite and at most {LARGEST:g}: lower the "
        "rewards, their weights or model.loss.beta"
    )


def signals_by_rollout(batches: Sequence[Batch], signals: Sequence[TrainerSignals]) -> dict[int, TrainerSignals]:
    """Takes the trainer's signals of whole batches apart: those of the sampled tokens, by `id(rollout)`."""
    found = {}
    for batch, of_batch in zip(batches, signals, strict=True):
        for row, sample in enumerate(batch.samples):
            mask = batch.loss_mask[row].cpu()
            kl = None if of_batch.kl is None else of_batch.kl[row].cpu()[mask]
            values = None if of_batch.values is None else of_batch.values[row].cpu()[mask]
            found[id(sample.rollout)] = TrainerSignals(kl, values)
    return found


def _token_advantages(
    config: LossConfig,
    groups: Sequence[RolloutGroup],
    weights: dict[str, float],
    signals: dict[int, TrainerSignals],
    over_ranks: OverRanks,
) -> tuple[Tensor, Tensor | None]:
    """Advantages [R, A] and, with a critic, the targets of its values [R, A]."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = torch.tensor([rollout.num_sampled_tokens for rollout in rollouts], dtype=torch.int64)
    mask = torch.arange(int(lengths.max()) if rollouts else 0) < lengths.unsqueeze(1)
    trained = torch.tensor([is_trained_on(config, rollout) for rollout in rollouts], dtype=torch.bool)
    kept = mask & trained.unsqueeze(1)
    kl_cost = torch.zeros(mask.shape, dtype=torch.float64)
    if config.kl_in_reward:
        kl_cost = config.beta * _padded([signals[id(rollout)].kl for rollout in rollouts], mask)
    rewards = group_rewards([group.rollouts for group in groups])
    if config.parts.advantage in GROUP_ADVANTAGES:
        per_rollout = _sibling_advantages(config, groups, weights, rewards, kl_cost.sum(dim=1)).reshape(-1, 1)
        if config.parts.reward_aggregation == "normalize_then_sum":  # GDPO
            # Over all that were scored, whose mean is 0: a group without spread keeps its advantage of 0.
            per_rollout = _normalised(per_rollout, ~rewards.reshape(-1, 1).isnan(), over_ranks)
        per_token = per_rollout * mask
        return (
            _normalised(per_token, kept, over_ranks) if config.parts.advantage == "group_mean_batch_norm" else per_token
        ), None
    is_last = torch.arange(mask.shape[1]) == (lengths - 1).unsqueeze(1)
    token_rewards = torch.where(is_last, rewards.reshape(-1, 1).nan_to_num(nan=0.0), 0.0) - kl_cost
    if config.parts.advantage == "gae":
        values = _padded([signals[id(rollout)].values for rollout in rollouts], mask)
        return _gae_advantages(config, token_rewards, values, kept, over_ranks)
    returns = rewards_to_go(token_rewards, mask)
    return _normalised(returns, kept, over_ranks) if config.parts.advantage == "batch_norm" else returns, None


def _gae_advantages(
    config: LossConfig, token_rewards: Tensor, values: Tensor, kept: Tensor, over_ranks: OverRanks
) -> tuple[Tensor, Tensor]:
    """Advantages and targets of the kept tokens, [R, A]. A rollout that is not kept has no token here, so none is mixed in."""
    estimates = gae(token_rewards, values, kept, config.critic.gamma, config.critic.lam)
    targets = torch.where(kept, estimates + values, 0.0)
    return (_normalised(estimates, kept, over_ranks) if config.critic.whiten else estimates), targets


def _sibling_advantages(
    config: LossConfig,
    groups: Sequence[RolloutGroup],
    weights: dict[str, float],
    rewards: Tensor,
    kl_cost: Tensor,
) -> Tensor:
    """Advantages of whole rollouts, [N, G]."""
    if not groups:
        return rewards
    if config.parts.reward_aggregation == "normalize_then_sum":
        return _sum_of_normalised(groups, weights)
    rewards = rewards - torch.tensor(_penalties_of_alike(groups), dtype=torch.float64)
    return _compared(config.parts.advantage, rewards - kl_cost.reshape(rewards.shape))


def _penalties_of_alike(groups: Sequence[RolloutGroup]) -> list[list[float]]:
    """What length took from siblings that are otherwise alike and are not to be told apart by it; 0 for all others."""
    return [
        [0.0 if group.has_spread else rollout.rewards.get(OVERLONG) or 0.0 for rollout in group.rollouts]
        for group in groups
    ]


def _compared(advantage: Advantage, rewards: Tensor) -> Tensor:
    match advantage:
        case "group_norm":
            return group_norm_advantages(rewards)
        case "leave_one_out":
            return leave_one_out_advantages(rewards)
        case _:
            return group_mean_advantages(rewards)


def _sum_of_normalised(groups: Sequence[RolloutGroup], weights: dict[str, float]) -> Tensor:
    """Each reward function normalised in its group, then the weighted sum: GDPO, arXiv:2601.05242."""
    total = torch.zeros(len(groups), len(groups[0].rollouts), dtype=torch.float64)
    for name in groups[0].rollouts[0].rewards:
        values = [[rollout.rewards[name] for rollout in group.rollouts] for group in groups]
        own = torch.tensor([[torch.nan if v is None else v for v in row] for row in values], dtype=torch.float64)
        if name == OVERLONG:
            own -= torch.tensor(_penalties_of_alike(groups), dtype=torch.float64)
        total += weights.get(name, 1.0) * group_norm_advantages(own)
    return total


def _normalised(values: Tensor, kept: Tensor, over_ranks: OverRanks) -> Tensor:
    """Normalised over the kept values of the step and all ranks; 0 elsewhere."""
    selected = values[kept]
    normalised = batch_norm_advantages(selected, over_ranks(moments(selected)))
    return torch.zeros_like(values, dtype=torch.float64).masked_scatter(kept, normalised)


def _padded(rows: Sequence[Tensor | None], mask: Tensor) -> Tensor:
    """Rows of different lengths as float64 [R, A], 0 where the mask is False."""
    if not rows:
        return torch.zeros(mask.shape, dtype=torch.float64)
    given = [row.double() for row in rows if row is not None]
    assert len(given) == len(rows), "the trainer scored every rollout"
    return pad_sequence(given, batch_first=True)[:, : mask.shape[1]]
