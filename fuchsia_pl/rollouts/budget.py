"""How many micro-batches a step needs, so that even the longest rows that the config allows fit into a budget of tokens."""

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class MicroBatchPlan:
    """How a rank's rows of a step are dealt out.

    Attributes:
        num_micro_batches: What becomes the trainer's `accumulate_grad_batches`.
        units_per_batch: Units (sibling groups, parts of them, or rows) in one micro-batch at most.
        siblings_per_unit: Rows of a unit at most.
    """

    num_micro_batches: int
    units_per_batch: int
    siblings_per_unit: int


def plan_micro_batches(
    row: LongestRow, num_groups: int, group_size: int, shares_prefix: bool, max_tokens: int
) -> MicroBatchPlan:
    """Finds the fewest micro-batches that hold `max_tokens` at most, if every row is the longest.

    Args:
        row: The longest row.
        num_groups: Groups of a rank's step.
        group_size: Siblings of a group.
        shares_prefix: Whether siblings' prefix is computed once.
        max_tokens: The budget of a micro-batch, in tokens of the forward.

    Raises:
        ConfigError: Not even one row fits.

    >>> plan_micro_batches(LongestRow(40, 24), num_groups=8, group_size=8, shares_prefix=True, max_tokens=512)
    MicroBatchPlan(num_micro_batches=4, units_per_batch=2, siblings_per_unit=8)
    """
    if row.num_inputs > max_tokens:
        raise ConfigError(
            f"model.policy.max_tokens_per_micro_batch={max_tokens} is less than the longest row has, {row.num_inputs} tokens "
            f"({row.prompt_tokens} of the prompt, {row.own_tokens} after it): raise it to that, or lower data.sampling.max_length"
        )
    siblings = group_size if shares_prefix else 1
    while row.num_computed(siblings, shares_prefix) > max_tokens:
        siblings = math.ceil(siblings / 2)
    units = num_groups * _num_parts(group_size, siblings)
    per_batch = max_tokens // row.num_computed(siblings, shares_prefix)
    number = math.ceil(units / per_batch)
    return MicroBatchPlan(number, math.ceil(units / number), siblings)


def _num_parts(group_size: int, siblings: int) -> int:
    """Into how many units halving cuts a group until none has more rows than `siblings`."""
    return group_size if siblings == 1 else 2 ** math.ceil(math.log2(group_size / siblings))


def longest_unit(row: LongestRow, num_siblings: int, item_index: int, temperature: float) -> list[Sample]:
    """Siblings that are as long as can be, made of filler: what the memory of a run has to hold."""
    prompt = [position % NUM_FILLER_IDS for position in range(row.prompt_tokens)]
    samples = []
    for sibling in range(num_siblings):
        rollout = Rollout({}, item_index, sibling, temperature, prompt="")
        rollout.start(prompt)
        own = tuple((sibling + position) % NUM_FILLER_IDS for position in range(row.own_tokens))
        rollout.append(Turn(Completion(own, (-1.0,) * len(own), "length", None, policy_version=0), "", ""))
        filler = (1.0,) * len(own)
        samples.append(Sample(rollout, filler, old_values=filler, value_targets=filler))
    return samples
