"""From scored rollouts to trainable rows: the tensors of credit assignment, and the samples made of its advantages.

The advantages of a rollout of several rows are those of its sampled tokens, row after row.

Shape letters: N groups, G siblings, R = N x G rollouts, T sampled tokens of the longest rollout.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fuchsia_pl.batch import Batch, TrainerSignals
from fuchsia_pl.objectives.advantages import has_spread
from fuchsia_pl.objectives.config import LossConfig, shared_credit_words
from fuchsia_pl.objectives.credit import CreditInputs, OverRanks, assign_credit
from fuchsia_pl.objectives.rewards import overlong_penalty
from fuchsia_pl.objectives.teacher import with_teacher
from fuchsia_pl.objectives.turns import differ_by_turn
from fuchsia_pl.rollouts.scoring import LARGEST, RewardError
from fuchsia_pl.rollouts.turn_credit import add_turn_rewards, group_returns, turn_end_positions
from fuchsia_pl.samples import RolloutGroup, Sample
from fuchsia_pl.types import ConfigError, Rollout, RolloutStatus

OVERLONG = "overlong"
SAME_CREDIT = 1e-6  # largest relative difference of advantages that count as equal


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


def named_rewards(rollout: Rollout) -> dict[str, float | None]:
    """Rewards by the names that `weights_at` has: those of a part of a mixture as `part/name`; the length penalty as it is.

    >>> rollout = Rollout({}, 0, 0, 1.0, "", rewards={"correct": 1.0, "overlong": -0.5}, part="sums")
    >>> named_rewards(rollout)
    {'sums/correct': 1.0, 'overlong': -0.5}
    """
    prefix = f"{rollout.part}/" if rollout.part else ""
    return {name if name == OVERLONG else f"{prefix}{name}": value for name, value in rollout.rewards.items()}


def even_groups(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """Groups of one size, for tensors of groups: smaller ones are filled with rollouts without tokens, rewards and row.

    >>> one, two = (RolloutGroup((Rollout({}, 0, 0, 1.0, ""),) * number, has_spread=False) for number in (1, 2))
    >>> [len(group.rollouts) for group in even_groups([one, two])]
    [2, 2]
    """
    largest = max((len(group.rollouts) for group in groups), default=0)
    return [
        replace(group, rollouts=(*group.rollouts, *(_absent() for _ in range(largest - len(group.rollouts)))))
        for group in groups
    ]


def _absent() -> Rollout:
    return Rollout({}, item_index=-1, sibling=-1, temperature=1.0, prompt="")


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
    teacher_weight: float = 1.0,
) -> list[Sample]:
    """Assigns an advantage to every sampled token, and omits the rollouts that are not trained on.

    A rollout that is masked for being truncated still counts in the mean and spread of its siblings.

    Args:
        config: The objective.
        groups: This rank's groups.
        weights: Weight of each reward function by name, 1.0 where not given; needed for "normalize_then_sum".
        signals: Signals of the rollouts in order, [R, T], see `signals_of`; each None where the objective does not need it.
        over_ranks: Sums a tensor over all ranks. Every rank calls it equally often.
        teacher_weight: Weight of the teacher's advantages, if the signals have its logprobs.

    Raises:
        RewardError: An advantage, or the target of a value, is not finite or too large for a batch.
        ConfigError: The tokens of a row have different advantages, and the objective gives a row one credit.
    """
    groups = even_groups(groups)
    inputs = credit_inputs(config, groups, weights, signals)
    advantages, targets = assign_credit(config.parts.advantage, inputs, over_ranks)
    if signals.teacher_logprobs is not None:
        assert signals.policy_logprobs is not None
        advantages = with_teacher(advantages, signals.teacher_logprobs, signals.policy_logprobs, teacher_weight)
    samples: list[Sample] = []
    for row, rollout in enumerate(rollout for group in groups for rollout in group.rollouts):
        if not is_trained_on(config, rollout):
            continue
        length = rollout.num_sampled_tokens
        own = TrainerSignals(*(None if of is None else of[row, :length] for of in vars(signals).values()))
        credit = advantages[row, :length].tolist()
        _check_bounds(rollout, credit, own)
        if config.shares_credit:
            _check_shared(config, rollout, credit)
        wanted = None if targets is None else targets[row, :length].tolist()
        if wanted is not None:
            _check_bounds(rollout, wanted, own)
        samples += _samples(rollout, credit, None if wanted is None else own.values, wanted)
    return samples


def _check_shared(config: LossConfig, rollout: Rollout, credit: list[float]) -> None:
    """Refuses advantages of single tokens, such as by rewards of turns or a user's function, where a row has one credit.

    Raises:
        ConfigError: The tokens of a row have different advantages.
    """
    for place in places_of_rows(rollout):
        values = credit[place]
        if values and max(values) - min(values) > SAME_CREDIT * max(map(abs, values)):
            raise ConfigError(
                f"the tokens of item {rollout.item_index} have advantages from {min(values):g} to {max(values):g} by "
                f"model.loss.advantage {config.parts.advantage!r}, and {shared_credit_words(config)}"
            )


def _samples(
    rollout: Rollout, credit: list[float], values: Tensor | None, targets: list[float] | None
) -> Iterator[Sample]:
    """The rows of a rollout that have sampled tokens.

    Args:
        rollout: The rollout.
        credit: Advantage of each of its sampled tokens.
        values: The critic's values of them, None without a critic.
        targets: Their targets, None without a critic.
    """
    old_values = None if values is None else values.tolist()
    for number, place in enumerate(places_of_rows(rollout)):
        if place.start < place.stop:
            yield Sample(rollout, tuple(credit[place]), _part(old_values, place), _part(targets, place), number)


def _part(values: list[float] | None, place: slice) -> tuple[float, ...] | None:
    return None if values is None else tuple(values[place])


def places_of_rows(rollout: Rollout) -> list[slice]:
    """For each row, the place of its tokens among all sampled tokens of the rollout.

    >>> rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="", loss_mask=[False, True, True])
    >>> places_of_rows(rollout)
    [slice(0, 2, None)]
    """
    ends = list(accumulate(row.num_sampled_tokens for row in rollout.rows))
    return [slice(start, end) for start, end in pairwise([0, *ends])]


def credit_inputs(
    config: LossConfig, groups: Sequence[RolloutGroup], weights: dict[str, float], signals: TrainerSignals
) -> CreditInputs:
    """The tensors of credit assignment; the arguments are those of `make_samples`, with groups of one size."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [rollout.num_sampled_tokens for rollout in rollouts]
    rewards = group_rewards([group.rollouts for group in groups])
    named = [[named_rewards(rollout) for rollout in group.rollouts] for group in groups]
    names = dict.fromkeys(name for siblings in named for one in siblings for name in one if name != OVERLONG)
    by_name = {name: _per_rollout([[one.get(name) for one in siblings] for siblings in named]) for name in names}
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
    rollouts = [rollout for group in even_groups(groups) for rollout in group.rollouts]
    rows = {id(rollout): row for row, rollout in enumerate(rollouts)}  # batches have another order
    shape = len(rollouts), max((rollout.num_sampled_tokens for rollout in rollouts), default=0)

    def collected(given: Sequence[Tensor | None]) -> Tensor | None:
        if any(of_batch is None for of_batch in given):
            return None
        found = torch.zeros(shape)
        for batch, of_batch in zip(batches, given, strict=True):
            assert of_batch is not None
            for index, sample in enumerate(batch.samples):
                mask = batch.loss_mask[index].cpu()
                place = places_of_rows(sample.rollout)[sample.row_number]
                found[rows[id(sample.rollout)], place] = of_batch[index].cpu()[mask]
        return found

    return TrainerSignals(
        *(collected([vars(each)[field.name] for each in signals]) for field in fields(TrainerSignals))
    )


def kl_fraction(groups: Sequence[RolloutGroup], signals: TrainerSignals) -> tuple[float, float] | None:
    """Sum of the KL over the sampled tokens of some groups, and their number; None where there is no KL in the reward."""
    if signals.kl is None:
        return None
    num_tokens = sum(rollout.num_sampled_tokens for group in groups for rollout in group.rollouts)
    return float(sum(row.sum() for row in signals.kl)), float(num_tokens)


def _per_rollout(values: Sequence[Sequence[float | None]]) -> Tensor:
    """float64 [N, G], NaN for None and where a group is smaller. Without groups it is [0, 2]."""
    if not values:
        return torch.zeros(0, 2, dtype=torch.float64)
    largest = max(len(row) for row in values)
    filled = [[*row, *(None for _ in range(largest - len(row)))] for row in values]
    return torch.tensor([[torch.nan if v is None else v for v in row] for row in filled], dtype=torch.float64)


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
    if signals.teacher_logprobs is not None:
        parts.append(f"lowest logprob of the teacher {float(signals.teacher_logprobs.min()):g}")
    raise RewardError(
        f"an advantage of sibling {rollout.sibling} of item {rollout.item_index} is {endless:g}, from a total reward of "
        f"{rollout.reward:g} with the parts {', '.join(parts)}. Advantages must be finite and at most {LARGEST:g}: lower the "
        "rewards, their weights or model.loss.beta"
    )
