"""How many micro-batches a step needs, so that even the longest rows that the config allows fit into a budget of tokens."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.types import Completion, ConfigError, Rollout, Sample, Turn

# Ids of rows that are only computed to see whether they fit; every vocabulary has so many.
NUM_FILLER_IDS = 32


@dataclass(frozen=True)
class LongestRow:
    """The longest row that can be sampled.

    Attributes:
        prompt_tokens: Tokens that siblings share. With several turns the shortest prompt leaves the most for each sibling alone.
        own_tokens: What follows: completion, or turns and responses.

    >>> LongestRow(prompt_tokens=40, own_tokens=24).num_inputs
    63
    """

    prompt_tokens: int
    own_tokens: int

    @property
    def num_inputs(self) -> int:
        """Tokens of the forward that it takes alone: its last token is no input."""
        return self.prompt_tokens + self.own_tokens - 1

    def num_computed(self, num_siblings: int, shares_prefix: bool) -> int:
        """Tokens of the forward that some siblings take together."""
        saved = (num_siblings - 1) * self.prompt_tokens if shares_prefix else 0
        return num_siblings * self.num_inputs - saved


def check_budget(row: LongestRow, max_tokens: int) -> None:
    """Refuses a budget that not even one row fits into.

    Raises:
        ConfigError: It does not.
    """
    if row.num_inputs > max_tokens:
        raise ConfigError(
            f"model.policy.max_tokens_per_micro_batch={max_tokens} is less than the longest row has, {row.num_inputs} tokens "
            f"({row.prompt_tokens} of the prompt, {row.own_tokens} after it): raise it to that, or lower data.sampling.max_length"
        )


def plan_micro_batches(row: LongestRow, num_groups: int, group_size: int, shares_prefix: bool, max_tokens: int) -> int:
    """The fewest micro-batches that hold `max_tokens` at most, if every row is the longest.

    Groups are cut in halves, and these again, where siblings share a prefix and one group alone is above the budget.

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
    siblings = group_size if shares_prefix else 1
    while row.num_computed(siblings, shares_prefix) > max_tokens:
        siblings = math.ceil(siblings / 2)
    units = num_groups * _num_pieces(group_size, siblings)
    per_batch = max_tokens // row.num_computed(siblings, shares_prefix)
    return math.ceil(units / per_batch)


def _num_pieces(group_size: int, siblings: int) -> int:
    """Into how many units halving cuts a group until none has more rows than `siblings`."""
    return group_size if siblings == 1 else 2 ** math.ceil(math.log2(group_size / siblings))


def longest_row(prompt_lengths: Collection[int], sampling: SamplingConfig, has_turns: bool) -> LongestRow:
    """The longest row that the prompts of a split leave room for.

    Args:
        prompt_lengths: Tokens of each prompt that may be drawn.
        sampling: The lengths that are allowed.
        has_turns: Whether responses, of any length, may come between turns.

    >>> longest_row([5, 9], SamplingConfig(max_completion_tokens=8, max_length=32), has_turns=False)
    LongestRow(prompt_tokens=9, own_tokens=8)
    >>> longest_row([5, 9], SamplingConfig(max_completion_tokens=8, max_length=32), has_turns=True)
    LongestRow(prompt_tokens=5, own_tokens=27)
    """
    shortest, longest = min(prompt_lengths), max(prompt_lengths)
    if has_turns:
        return LongestRow(shortest, sampling.max_length - shortest)
    return LongestRow(longest, sampling.max_completion_tokens)


def longest_samples(row: LongestRow, num_groups: int, num_siblings: int, temperature: float) -> list[Sample]:
    """Groups that are as long as can be, made of filler: what the memory of a run has to hold."""
    return [
        Sample(rollout, filler, old_values=filler, value_targets=filler)
        for item_index in range(num_groups)
        for rollout in _longest_group(row, item_index, num_siblings, temperature)
        for filler in [(1.0,) * row.own_tokens]
    ]


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
