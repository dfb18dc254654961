"""The longest rows that a config allows: how many micro-batches they need within a budget of tokens, and the largest one."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from fuchsia_pl.batch import Batch, StepInfo
from fuchsia_pl.rollouts.batcher import Unit, count_denominators, make_batches, split_balanced
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.training_phase import Forward
from fuchsia_pl.samples import Sample
from fuchsia_pl.types import Completion, ConfigError, Rollout, Turn

# Ids of rows that only measure memory. Every vocabulary has at least this many.
NUM_FILLER_IDS = 32


@dataclass(frozen=True)
class LongestRow:
    """The longest row that can be sampled.

    Attributes:
        prompt_tokens: Tokens that siblings share. With several turns, the shortest prompt leaves the most tokens to each sibling.
        own_tokens: Tokens after the prompt: a completion, or turns and responses.

    >>> LongestRow(prompt_tokens=40, own_tokens=24).num_inputs
    63
    """

    prompt_tokens: int
    own_tokens: int

    @property
    def num_inputs(self) -> int:
        """Tokens of the forward for this row alone. Its last token is no input."""
        return self.prompt_tokens + self.own_tokens - 1

    def num_computed(self, num_siblings: int, shares_prefix: bool) -> int:
        """Tokens of the forward for some siblings."""
        saved = (num_siblings - 1) * self.prompt_tokens if shares_prefix else 0
        return num_siblings * self.num_inputs - saved

    def shortened(self, num_siblings: int, num_tokens: int) -> "LongestRow":
        """The longest row with which some siblings that share their prompt take at most `num_tokens` tokens.

        >>> LongestRow(prompt_tokens=40, own_tokens=24).shortened(num_siblings=4, num_tokens=100)
        LongestRow(prompt_tokens=40, own_tokens=16)
        """
        prompt = min(self.prompt_tokens, num_tokens)
        return LongestRow(prompt, min(self.own_tokens, (num_tokens - prompt) // num_siblings + 1))


def check_budget(row: LongestRow, max_tokens: int) -> None:
    """Checks that one row fits into the budget.

    Raises:
        ConfigError: It does not fit.
    """
    if row.num_inputs > max_tokens:
        raise ConfigError(
            f"model.policy.max_tokens_per_micro_batch={max_tokens} is less than the longest row has, {row.num_inputs} tokens "
            f"({row.prompt_tokens} of the prompt, {row.own_tokens} after it): raise it to that, or lower data.sampling.max_length"
        )


def check_no_number(num_micro_batches: int, planned: int, max_tokens: int) -> None:
    """Refuses a budget together with a number of micro-batches.

    Args:
        num_micro_batches: `trainer.accumulate_grad_batches`.
        planned: The number that an earlier run of the same trainer was given by its budget, else 1.
        max_tokens: The budget.

    Raises:
        ConfigError: Both are set.
    """
    if num_micro_batches not in (1, planned):
        raise ConfigError(
            f"trainer.accumulate_grad_batches={num_micro_batches} and model.policy.max_tokens_per_micro_batch={max_tokens} "
            "both set the number of micro-batches: leave the budget out, or set --trainer.accumulate_grad_batches 1"
        )


def plan_micro_batches(row: LongestRow, num_groups: int, group_size: int, shares_prefix: bool, max_tokens: int) -> int:
    """Smallest number of micro-batches with at most `max_tokens` each, if every row has the greatest length.

    If siblings share a prefix and one group alone exceeds the budget, groups are halved until they fit.

    Args:
        row: The longest row.
        num_groups: Groups of a rank's step.
        group_size: Siblings of a group.
        shares_prefix: Whether siblings' prefix is computed once.
        max_tokens: The budget of a micro-batch, in tokens of the forward.

    Raises:
        ConfigError: Not even one row fits.

    >>> plan_micro_batches(LongestRow(40, 24), num_groups=8, group_size=8, shares_prefix=True, max_tokens=512)
    4
    """
    check_budget(row, max_tokens)
    siblings = _num_together(row, group_size, shares_prefix, max_tokens)
    units = num_groups * _num_pieces(group_size, siblings)
    per_batch = max_tokens // row.num_computed(siblings, shares_prefix)
    return math.ceil(units / per_batch)


def _num_together(row: LongestRow, group_size: int, shares_prefix: bool, max_tokens: int) -> int:
    """Number of the longest rows in a unit: the siblings of a group, halved until they fit."""
    siblings = group_size if shares_prefix else 1
    while row.num_computed(siblings, shares_prefix) > max_tokens:
        siblings = math.ceil(siblings / 2)
    return siblings


def _num_pieces(group_size: int, siblings: int) -> int:
    """Number of units after a group is halved until no unit has more rows than `siblings`."""
    return group_size if siblings == 1 else 2 ** math.ceil(math.log2(group_size / siblings))


def longest_row(prompt_lengths: Collection[int], sampling: SamplingConfig, has_turns: bool) -> LongestRow:
    """Longest row that can be sampled from the prompts of a split.

    Args:
        prompt_lengths: Number of tokens of each prompt that may be drawn.
        sampling: Allowed lengths.
        has_turns: Whether there may be several turns, with responses of any length between them.

    >>> longest_row([5, 9], SamplingConfig(max_completion_tokens=8, max_length=32), has_turns=False)
    LongestRow(prompt_tokens=9, own_tokens=8)
    >>> longest_row([5, 9], SamplingConfig(max_completion_tokens=8, max_length=32), has_turns=True)
    LongestRow(prompt_tokens=5, own_tokens=27)
    """
    shortest, longest = min(prompt_lengths), max(prompt_lengths)
    if has_turns:
        return LongestRow(shortest, sampling.max_length - shortest)
    return LongestRow(longest, sampling.max_completion_tokens)


def longest_samples(
    row: LongestRow, num_groups: int, num_siblings: int, temperature: float, first: int = 0
) -> list[Sample]:
    """Groups of rows with the greatest length, filled with arbitrary ids. They need the most memory of a run.

    Args:
        row: The longest row.
        num_groups: Number of groups.
        num_siblings: Rows of a group.
        temperature: Sampling temperature.
        first: Position of the first group's item.
    """
    return [
        Sample(rollout, filler, old_values=filler, value_targets=filler)
        for item_index in range(first, first + num_groups)
        for rollout in _longest_group(row, item_index, num_siblings, temperature)
        for filler in [(1.0,) * row.own_tokens]
    ]


def longest_batch(row: LongestRow, num_groups: int, sampling: SamplingConfig, forward: Forward, step: int) -> Batch:
    """The largest micro-batch that a step may have.

    Without a budget, it is the largest of a step in which every row has the greatest length. With a budget, shorter rows may
    use more of it than the longest ones, so it has the longest rows and beside them shorter ones that fill the budget.

    Args:
        row: The longest row.
        num_groups: Groups of a rank's step.
        sampling: Settings of sampling.
        forward: The trainer's forward pass.
        step: The optimizer step.
    """
    if forward.max_tokens is None:
        samples = longest_samples(row, num_groups, sampling.group_size, sampling.temperature)
        split = split_balanced(samples, forward.num_micro_batches, forward.shares_prefix)
        largest = max(split, key=lambda units: sum(len(unit) for unit in units))
    elif forward.shares_prefix:
        largest = _fullest_units(row, num_groups, sampling, forward.max_tokens)
    else:
        largest = _fullest_rows(row, num_groups * sampling.group_size, sampling.temperature, forward.max_tokens)
    denominators = count_denominators([sample for unit in largest for sample in unit], sampling.max_completion_tokens)
    return make_batches([largest], StepInfo(step, denominators, policy_version=step))[0]


def _fullest_units(row: LongestRow, num_groups: int, sampling: SamplingConfig, max_tokens: int) -> list[Unit]:
    """Units of siblings with the greatest length, and one of shorter siblings, that fill a budget as far as the step can."""
    siblings = _num_together(row, sampling.group_size, True, max_tokens)
    size = row.num_computed(siblings, True)
    num_units = num_groups * _num_pieces(sampling.group_size, siblings)
    number = min(max_tokens // size, num_units)
    rest = max_tokens - number * size
    samples = longest_samples(row, number, siblings, sampling.temperature)
    if rest and number < num_units:
        samples += longest_samples(row.shortened(siblings, rest), 1, siblings, sampling.temperature, first=number)
    return [samples[start : start + siblings] for start in range(0, len(samples), siblings)]


def _fullest_rows(row: LongestRow, num_rows: int, temperature: float, max_tokens: int) -> list[Unit]:
    """Plain rows of one length that fill a budget as far as the step can: the longest ones, or one more and shorter ones."""
    number = min(max_tokens // row.num_inputs, num_rows)
    more = min(number + 1, num_rows)
    shorter = row.shortened(1, max_tokens // more)
    if more * shorter.num_inputs > number * row.num_inputs:
        number, row = more, shorter
    return [[sample] for sample in longest_samples(row, number, 1, temperature)]


def _longest_group(row: LongestRow, item_index: int, num_siblings: int, temperature: float) -> list[Rollout]:
    prompt = [position % NUM_FILLER_IDS for position in range(row.prompt_tokens)]
    rollouts = []
    for sibling in range(num_siblings):
        rollout = Rollout({}, item_index, sibling, temperature, prompt="")
        rollout.start(prompt)
        own = tuple((sibling + position) % NUM_FILLER_IDS for position in range(row.own_tokens))
        rollout.append(Turn(Completion(own, (-1.0,) * len(own), "length", None, policy_version=0), "", "", "", ""))
        rollouts.append(rollout)
    return rollouts
