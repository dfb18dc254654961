"""From scored rollouts to trainable rows: the tensors of credit assignment, and the samples made of its advantages.

Shape letters: N groups, G siblings, R = N x G rollouts, T sampled tokens of the longest rollout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fuchsia_pl.batch import Batch, TrainerSignals
from fuchsia_pl.objectives.advantages import has_spread
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.credit import CreditInputs, OverRanks, assign_credit
from fuchsia_pl.objectives.rewards import overlong_penalty
from fuchsia_pl.objectives.turns import differ_by_turn
from fuchsia_pl.rollouts.scoring import LARGEST, RewardError
from fuchsia_pl.rollouts.turn_credit import add_turn_rewards, group_returns, turn_end_positions
from fuchsia_pl.types import Rollout, RolloutGroup, RolloutStatus, Sample

OVERLONG = "overlong"


def group_rewards(groups: Sequence[Sequence[Rollout]]) -> Tensor:
    """Total rewards, float64 [N, G], NaN where a rollout was not scored."""
    return _per_rollout([[rollout.reward for rollout in group] for group in groups])


def make_groups(siblings: Sequence[Sequence[Rollout]], by_turn: bool = False) -> list[RolloutGroup]:
    """Groups with the flag whether their rewards differ.

    Args:
        siblings: The rollouts of each group.
        by_turn: Whether siblings with equal rewards differ if they got them in other turns.
    """
    totals = group_rewards(siblings)
    spread = (differ_by_turn(group_returns(siblings, totals)) if by_turn else has_spread(totals)).tolist()
    return [RolloutGroup(tuple(group), differs) for group, differs in zip(siblings, spread, strict=True)]


def penalise_overlong(config: LossConfig, groups: Sequence[RolloutGroup], max_completion_tokens: int) -> None:
    """Adds the soft length penalty to the rewards, where the objective has it, as a reward function `overlong`.

    It is added after the check for spread, as in DAPO: siblings that are all wrong do not differ by their length.
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
    """Whether a rollout becomes a row: it was scored, has a sampled token, and is not masked for being truncated."""
    masked = config.parts.truncated == "mask" and rollout.status is RolloutStatus.TRUNCATED
    return rollout.reward is not None and rollout.num_sampled_tokens > 0 and not masked


def changes_nothing(config: LossConfig, sample: Sample) -> bool:
    """Whether a row has no gradient: its advantages are 0, and no other term of the loss uses its tokens."""
    is_used = config.kl_in_loss or config.entropy_weight > 0.0 or config.parts.advantage == "gae"
    return not is_used and not any(sample.advantages)


def make_samples(
    config: LossConfig,
    groups: Sequence[RolloutGroup],
    weights: dict[str, float],
    signals: TrainerSignals,
    over_ranks: OverRanks,
) -> list[Sample]:
    """Assigns an advantage to every sampled token, and omits the rollouts that are not trained on.

    A rollout that is masked for being truncated still counts in the mean and spread of its siblings.

    Args:
        config: The objective.
        groups: This rank's groups.
        weights: Weight of each reward function by name, 1.0 where not given; needed for "normalize_then_sum".
        signals: Signals of the rollouts in order, [R, T], see `signals_of`; each None where the objective does not need it.
        over_ranks: Sums a tensor over all ranks. Every rank calls it equally often.

    Raises:
        RewardError: An advantage, or the target of a value, is not finite or too large for a batch.
    """
    inputs = credit_inputs(config, groups, weights, signals)
    advantages, targets = assign_credit(config.parts.advantage, inputs, over_ranks)
    samples = []
    for row, rollout in enumerate(rollout for group in groups for rollout in group.rollouts):
        if not is_trained_on(config, rollout):
            continue
        length = rollout.num_sampled_tokens
        own = TrainerSignals(*(None if of is None else of[row, :length] for of in (signals.kl, signals.values)))
        credit = tuple(advantages[row, :length].tolist())
        _check_bounds(rollout, credit, own)
        if targets is None:
            samples.append(Sample(rollout, credit))
        else:
            assert own.values is not None
            wanted = tuple(targets[row, :length].tolist())
            _check_bounds(rollout, wanted, own)
            samples.append(Sample(rollout, credit, tuple(own.values.tolist()), wanted))
    return samples


def credit_inputs(
    config: LossConfig, groups: Sequence[RolloutGroup], weights: dict[str, float], signals: TrainerSignals
) -> CreditInputs:
    """The tensors of credit assignment; the arguments are those of `make_samples`."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [rollout.num_sampled_tokens for rollout in rollouts]
    rewards = group_rewards([group.rollouts for group in groups])
    names = [name for name in rollouts[0].rewards if name != OVERLONG] if rollouts else []
    by_name = {name: _per_rollout([[r.rewards[name] for r in group.rollouts] for group in groups]) for name in names}
    penalties = _per_rollout([[r.rewards.get(OVERLONG, 0.0) for r in group.rollouts] for group in groups])
    turn_ends = torch.zeros(len(rollouts), max(lengths, default=0), dtype=torch.bool)
    turn_rewards = torch.zeros(turn_ends.shape, dtype=torch.float64)
    for row, rollout in enumerate(rollouts):
        ends = turn_end_positions(rollout)
        turn_ends[row, ends[ends >= 0]] = True
        add_turn_rewards(turn_rewards[row], rollout)
    return CreditInputs(
        rewards=rewards,
        rewards_by_name=by_name,
        reward_weights=weights,
        penalties=penalties.masked_fill(rewards.isnan(), torch.nan),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        turn_ends=turn_ends,
        turn_rewards=turn_rewards,
        trained=torch.tensor([is_trained_on(config, rollout) for rollout in rollouts], dtype=torch.bool),
        signals=signals,
        settings=config.credit_settings,
    )


def signals_of(
    groups: Sequence[RolloutGroup], batches: Sequence[Batch], signals: Sequence[TrainerSignals]
) -> TrainerSignals:
    """Collects the trainer's signals of whole batches by rollout: those of the sampled tokens, [R, T], 0 behind them.

    Args:
        groups: The groups whose rollouts are the rows of the batches.
        batches: The batches.
        signals: The signals of each batch.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rows = {id(rollout): row for row, rollout in enumerate(rollouts)}  # batches have another order
    shape = len(rollouts), max((rollout.num_sampled_tokens for rollout in rollouts), default=0)
    has_kl, has_values = (
        all(of is not None for of in each) for each in ([s.kl for s in signals], [s.values for s in signals])
    )
    kl, values = torch.zeros(shape), torch.zeros(shape)
    for batch, of_batch in zip(batches, signals, strict=True):
        for index, sample in enumerate(batch.samples):
            row, mask = rows[id(sample.rollout)], batch.loss_mask[index].cpu()
            for found, given in ((kl, of_batch.kl), (values, of_batch.values)):
                if given is not None:
                    found[row, : int(mask.sum())] = given[index].cpu()[mask]
    return TrainerSignals(kl if has_kl else None, values if has_values else None)


def kl_fraction(groups: Sequence[RolloutGroup], signals: TrainerSignals) -> tuple[float, float] | None:
    """Sum of the KL over the sampled tokens of some groups, and their number; None where there is no KL in the reward."""
    if signals.kl is None:
        return None
    num_tokens = sum(rollout.num_sampled_tokens for group in groups for rollout in group.rollouts)
    return float(sum(row.sum() for row in signals.kl)), float(num_tokens)


def _per_rollout(values: Sequence[Sequence[float | None]]) -> Tensor:
    """float64 [N, G], NaN for None. Without groups it is [0, 2]."""
    if not values:
        return torch.zeros(0, 2, dtype=torch.float64)
    return torch.tensor([[torch.nan if v is None else v for v in row] for row in values], dtype=torch.float64)


def _check_bounds(rollout: Rollout, values: Sequence[float], signals: TrainerSignals) -> None:
    """Refuses advantages or targets that are not finite in a batch's float32, although all rewards are."""
    endless = next((value for value in values if not abs(value) <= LARGEST), None)
    if endless is None:
        return
    parts = [f"{name} {value:g}" for name, value in rollout.rewards.items() if value is not None]
    if signals.kl is not None:
        parts.append(f"KL {float(signals.kl.sum()):g}")
    if signals.values is not None:
        parts.append(f"largest value of the critic {float(signals.values.abs().max()):g}")
    raise RewardError(
        f"an advantage of sibling {rollout.sibling} of item {rollout.item_index} is {endless:g}, from a total reward of "
        f"{rollout.reward:g} with the parts {', '.join(parts)}. Advantages must be finite and at most {LARGEST:g}: lower the "
        "rewards, their weights or model.loss.beta"
    )
