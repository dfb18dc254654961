"""Micro-batches by what came: rows packed into as few as they fill, within a budget of tokens."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuchsia_pl.batch import StepInfo
from fuchsia_pl.rollouts.batcher import make_batches, split_filled
from fuchsia_pl.rollouts.budget import LongestRow, longest_batch, plan_micro_batches
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.training_phase import Forward
from fuchsia_pl.samples import Sample
from tests.doubles import denominators, make_sample


def group(item: int, prompt: list[int], *lengths: int) -> list[Sample]:
    """Siblings whose completions begin with different ids."""
    samples = [make_sample(prompt, [100 + n, *[7] * (length - 1)], 1.0) for n, length in enumerate(lengths)]
    for sibling, sample in enumerate(samples):
        sample.rollout.item_index, sample.rollout.sibling = item, sibling
    return samples


def no_signals(batches):
    raise AssertionError("no signals are needed")


def forward(number: int, max_tokens: int, shares_prefix: bool = True, highest=lambda values: values) -> Forward:
    return Forward(number, shares_prefix, no_signals, max_tokens=max_tokens, highest=highest)


def tokens(units: list[list[Sample]], shares_prefix: bool) -> int:
    """Computed tokens of a micro-batch, counted one position after the other."""
    rows = [
        (number, sample.rollout.token_ids[: sample.rollout.num_prompt_tokens + sample.rollout.num_sampled_tokens - 1])
        for number, unit in enumerate(units)
        for sample in unit
    ]
    if not shares_prefix:
        return len(rows) * max(len(ids) for _, ids in rows)
    # A position is shared if all of its unit's rows have the same ids up to it.
    computed = set()
    for row, (number, ids) in enumerate(rows):
        siblings = [other for which, other in rows if which == number]
        for end in range(1, len(ids) + 1):
            is_shared = all(other[:end] == ids[:end] for other in siblings)
            computed.add((number, end) if is_shared else (number, row, end))
    return len(computed)


def test_groups_by_hand():
    # A prompt of 4 and completions of 3 and 5: 4 + 2 + 4 = 10 tokens. The other groups have 4 + 1 + 1 = 6 and 4 + 4 + 4 = 12.
    first, second, third = group(0, [1, 2, 3, 4], 3, 5), group(1, [5, 2, 3, 4], 2, 2), group(2, [6, 2, 3, 4], 5, 5)
    assert split_filled([*first, *second, *third], 18, True) == [[third, second], [first]]
    assert split_filled([*first, *second, *third], 28, True) == [[third, first, second]]
    # Alone, the third exceeds 11, and its halves, single rows, have 8 tokens each.
    assert split_filled([*first, *second, *third], 11, True) == [[first], [third[:1]], [third[1:]], [second]]


def test_plain_rows_by_hand():
    # Inputs of 9, 8, 4, 3, 3 and 2 positions: 2 x 9 = 18, then 4 x 4 = 16.
    rows = [make_sample([1], [7] * length, 1.0) for length in (3, 9, 2, 8, 4, 3)]
    parts = split_filled(rows, 20, False)
    assert [[len(sample.rollout.token_ids) - 1 for (sample,) in part] for part in parts] == [[9, 8], [4, 3, 3, 2]]
    # All six would have 29 tokens, but 54 with their padding.
    assert len(split_filled(rows, 53, False)) == 2
    assert len(split_filled(rows, 54, False)) == 1


def test_empty_micro_batches_come_first_and_padding_before_rows():
    rows = group(0, [1, 2, 3], 2, 2)
    assert forward(4, 20).split(rows) == [None, None, None, [rows]]
    # Another rank fills three.
    assert forward(4, 20, highest=lambda values: values * 0 + 3).split(rows) == [None, [], [], [rows]]
    # Nothing on any rank: one micro-batch of padding, which ends the step.
    assert forward(3, 20).split([]) == [None, None, []]


def test_the_number_is_never_above_the_planned_one():
    groups = [group(item, [item, 2, 3], 4, 4) for item in range(5)]  # of 3 + 3 + 3 = 9 tokens
    samples = [sample for one in groups for sample in one]
    assert len(split_filled(samples, 9, True)) == 5
    parts = forward(3, 9).split(samples)
    assert sorted(len(part) for part in parts) == [1, 2, 2]
    # This rank would need one, another more than there may be.
    padded = forward(3, 100, highest=lambda values: values * 0 + 5).split(samples)
    assert [len(part) for part in padded] == [0, 0, 5]


def test_a_batch_without_rows():
    rows = group(0, [1, 2, 3], 2, 2)
    step = StepInfo(0, denominators(4), 0)
    empty, padding, full = make_batches([None, [], [rows]], step)
    assert [batch.has_rows for batch in (empty, padding, full)] == [False, True, True]
    assert (len(empty.input_ids), empty.lengths, empty.groups, empty.samples) == (0, (), (), ())
    assert [batch.num_computed_tokens(True) for batch in (empty, padding, full)] == [0, 1, 3 + 1 + 1]
    assert [batch.num_computed_tokens(False) for batch in (empty, padding, full)] == [0, 1, 2 * 4]
    assert empty.to("meta").input_ids.device.type == "meta"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_any_rows(seed, shares_prefix):
    numbers = random.Random(seed)
    num_groups, group_size = numbers.randint(1, 6), numbers.randint(2, 9)
    row = LongestRow(numbers.randint(1, 12), numbers.randint(1, 20))
    budget = numbers.randint(row.num_inputs, 8 * row.num_inputs)
    number = plan_micro_batches(row, num_groups, group_size, shares_prefix, budget)
    samples = []
    for item in range(num_groups):
        prompt = [numbers.randrange(5, 9) for _ in range(numbers.randint(1, row.prompt_tokens))]
        size = numbers.choice([0, group_size, numbers.randint(1, group_size)])  # groups and siblings may be left out
        lengths = [numbers.choice([row.own_tokens, numbers.randint(1, row.own_tokens)]) for _ in range(size)]
        samples += group(item, prompt, *lengths)
    numbers.shuffle(samples)
    parts = forward(number, budget, shares_prefix).split(samples)
    assert len(parts) == number
    used = [part for part in parts if part is not None]
    assert parts == [*[None] * (number - len(used)), *used]
    assert sorted(id(sample) for part in used for unit in part for sample in unit) == sorted(map(id, samples))
    if samples:
        assert all(used)
        assert max(tokens(part, shares_prefix) for part in used) <= budget
    if shares_prefix:
        for item in range(num_groups):
            siblings = [sample for sample in samples if sample.rollout.item_index == item]
            units = [unit for part in used for unit in part if unit[0].rollout.item_index == item]
            assert len(units) <= 1 or tokens([siblings], True) > budget


def test_the_largest_micro_batch_fills_the_budget_and_no_more():
    sampling = SamplingConfig(group_size=4, max_completion_tokens=6, max_length=40)
    row = LongestRow(prompt_tokens=10, own_tokens=6)  # a group has 10 + 4 x 5 = 30 tokens, a row 15
    batch = longest_batch(row, 5, sampling, forward(3, 70), step=2)
    # Two of them in 70, and in the other 10 a group of prompts alone.
    assert [(unit.num_rows, unit.prefix_length) for unit in batch.groups] == [(4, 10), (4, 10), (4, 10)]
    assert batch.num_computed_tokens(True) == 70
    batch = longest_batch(row, 5, sampling, forward(3, 85), step=2)
    assert batch.num_computed_tokens(True) == 60 + 10 + 4 * 3  # 4 siblings cannot use the other 3
    # A step of one group has no more.
    assert longest_batch(row, 1, sampling, forward(1, 85), step=2).num_computed_tokens(True) == 30
    # 4 rows of 15 are 60 of 70, and 5 of 14 are 70.
    batch = longest_batch(row, 5, sampling, forward(5, 70, shares_prefix=False), step=2)
    assert tuple(batch.input_ids.shape) == (5, 14)
    batch = longest_batch(row, 5, sampling, forward(5, 61, shares_prefix=False), step=2)
    assert tuple(batch.input_ids.shape) == (4, 15)
    # Without a budget, 5 groups in 3 micro-batches.
    plain = Forward(3, True, no_signals)
    assert longest_batch(row, 5, sampling, plain, step=2).input_ids.shape[0] == 8


@pytest.mark.parametrize("shares_prefix", [True, False])
def test_tensors_are_those_of_another_split(shares_prefix):
    """Every row has the same ids, mask, logprobs and advantages, whatever micro-batch it is in."""
    samples = [sample for item in range(6) for sample in group(item, [item, 2, 3], 2 + item, 5, 3)]
    step = StepInfo(0, denominators(4), 0)

    def rows(fw: Forward) -> dict[int, tuple[list, ...]]:
        found = {}
        for batch in make_batches(fw.split(samples), step):
            for row, sample in enumerate(batch.samples):
                mask = batch.loss_mask[row]
                parts = (batch.labels, batch.sampling_logprobs, batch.advantages)
                found[id(sample)] = tuple(part[row][mask].tolist() for part in parts)
        return found

    filled, balanced = rows(forward(6, 40, shares_prefix)), rows(Forward(6, shares_prefix, no_signals))
    assert filled == balanced
    assert len(filled) == len(samples)
