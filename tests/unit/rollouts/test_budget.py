"""Micro-batches within a budget of tokens, for any samples."""

import random

import pytest

from fuchsia_pl.rollouts.batcher import split_balanced
from fuchsia_pl.rollouts.budget import LongestRow, longest_row, longest_samples, plan_micro_batches
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.types import ConfigError
from tests.doubles import make_sample
from tests.unit.rollouts.test_batcher import num_computed_tokens


def test_plans_by_hand():
    row = LongestRow(prompt_tokens=40, own_tokens=24)
    # a row takes 63 tokens: 8 fit into 512, and 64 rows make 8 micro-batches
    assert plan_micro_batches(row, 8, 8, False, 512) == 8
    # a group takes 40 + 8 x 23 = 224: two fit into 512, and one, with nothing beside it, into 300
    assert plan_micro_batches(row, 8, 8, True, 512) == 4
    assert plan_micro_batches(row, 8, 8, True, 300) == 8
    # halves take 40 + 4 x 23 = 132, quarters 86, single rows 63
    assert plan_micro_batches(row, 8, 8, True, 200) == 16
    assert plan_micro_batches(row, 8, 8, True, 100) == 32
    assert plan_micro_batches(row, 8, 8, True, 63) == 64


def test_a_budget_below_one_row_is_refused():
    with pytest.raises(ConfigError, match=r"max_tokens_per_micro_batch=62 is less than the longest row has, 63 tokens"):
        plan_micro_batches(LongestRow(40, 24), 8, 8, True, 62)


@pytest.mark.parametrize("shares_prefix", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_no_micro_batch_is_above_the_budget_whatever_is_sampled(shares_prefix, seed):
    rng = random.Random(seed)
    num_groups, group_size = rng.randint(1, 6), rng.randint(2, 9)
    row = LongestRow(rng.randint(1, 12), rng.randint(1, 20))
    budget = rng.randint(row.num_inputs, 6 * row.num_inputs)
    number = plan_micro_batches(row, num_groups, group_size, shares_prefix, budget)
    samples = []
    for item in range(num_groups):
        prompt = [rng.randrange(5, 9) for _ in range(rng.randint(1, row.prompt_tokens))]
        for _ in range(
            rng.choice([group_size, rng.randint(1, group_size)])
        ):  # dropped siblings and groups change nothing
            own = [rng.randrange(5, 30) for _ in range(rng.choice([row.own_tokens, rng.randint(1, row.own_tokens)]))]
            sample = make_sample(prompt, own, 1.0)
            sample.rollout.item_index = item
            if rng.random() < 0.3:  # a response after which there was no room for a turn
                sample.rollout._extend([7] * 30, [False] * 30, [0.0] * 30)
            samples.append(sample)
    parts = split_balanced(samples, number, shares_prefix)
    assert len(parts) == number
    assert sorted(id(sample) for part in parts for unit in part for sample in unit) == sorted(map(id, samples))
    assert max(sum(num_computed_tokens(unit, shares_prefix) for unit in part) for part in parts) <= budget


def test_with_turns_the_shortest_prompt_leaves_most_to_each_sibling():
    sampling = SamplingConfig(max_completion_tokens=8, max_length=32)
    assert longest_row([5, 9, 7], sampling, has_turns=False).num_inputs == 16
    assert longest_row([5, 9, 7], sampling, has_turns=True) == LongestRow(5, 27)


def test_filler_is_as_long_as_can_be_and_shares_its_prompt_only():
    samples = longest_samples(LongestRow(40, 24), num_groups=2, num_siblings=8, temperature=0.7)
    assert [sample.rollout.item_index for sample in samples] == [0] * 8 + [1] * 8
    unit = samples[:8]
    assert {len(sample.rollout.token_ids) for sample in unit} == {64}
    assert num_computed_tokens(unit, True) == 40 + 8 * 23
    assert {sample.rollout.temperature for sample in unit} == {0.7}
    assert all(len(sample.advantages) == len(sample.old_values) == 24 for sample in unit)
