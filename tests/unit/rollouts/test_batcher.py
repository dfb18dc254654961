import torch

from fuchsia_pl.batch import PrefixGroup, StepInfo
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches, num_used_tokens, split_balanced
from fuchsia_pl.samples import Sample
from tests.doubles import denominators, make_sample

P0, P1, A0, A1, EOS = 11, 12, 21, 22, 2


def num_computed_tokens(unit, shares_prefix):
    """Tokens of the forward for some rows, without padding. The prefix of siblings is compared token by token."""
    inputs = [sample.row.token_ids[: num_used_tokens(sample.row) - 1] for sample in unit]
    total = sum(map(len, inputs))
    if not shares_prefix:
        return total
    equal = [len(set(ids)) == 1 for ids in zip(*inputs, strict=False)]
    prefix = max(next((place for place, same in enumerate(equal) if not same), len(equal)), 1)
    return total - (len(unit) - 1) * prefix


def test_the_shift_the_mask_and_the_padding_drawn_with_letters():
    # row 0: P0 P1 A0 A1 EOS      row 1: P0 A0
    long, short = make_sample([P0, P1], [A0, A1, EOS], 1.5), make_sample([P0], [A0], -0.5, logprob=-2.0)
    step = StepInfo(0, denominators(4, 2), policy_version=7)
    batch = make_batches(split_balanced([long, short], 1), step)[0]
    assert batch.input_ids.tolist() == [[P0, P1, A0, A1], [P0, A0, 0, 0]]
    assert batch.labels.tolist() == [[P1, A0, A1, EOS], [A0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert batch.sampling_logprobs.tolist() == [[0.0, -1.0, -1.0, -1.0], [-2.0, 0.0, 0.0, 0.0]]
    assert batch.advantages.tolist() == [[0.0, 1.5, 1.5, 1.5], [-0.5, 0.0, 0.0, 0.0]]
    assert batch.old_values is None
    assert batch.temperatures.tolist() == [1.0, 1.0]
    assert batch.samples == (long, short)
    assert batch.step is step


def test_an_end_of_turn_id_that_is_the_padding_id_keeps_its_loss():
    samples = [make_sample([P0], [A0, 0], 1.0), make_sample([P0], [A0, A1, A1], 1.0)]
    batch = make_batches(split_balanced(samples, 1), StepInfo(0, denominators(5), 0))[0]
    row = [sample.rollout.token_ids for sample in batch.samples].index([P0, A0, 0])
    assert batch.loss_mask[row].tolist() == [True, True, False]


def test_rows_are_split_into_exactly_that_many_micro_batches_balanced_by_tokens():
    # lengths 10, 6, 5, 4, 3, 2, one input less each: the rule puts 10 | 6 | 5, then 4 to 5 and 3 to 6; both have their
    # share of the rows then, so that 2 joins 10
    samples = [make_sample([1], [5] * (length - 1), 0.0) for length in (3, 10, 5, 2, 6, 4)]
    parts = split_balanced(samples, 3)
    assert [[len(sample.rollout.token_ids) for (sample,) in part] for part in parts] == [[10, 2], [6, 3], [5, 4]]


def test_what_the_environment_wrote_after_the_last_sampled_token_is_left_out():
    sample = make_sample([P0, P1], [A0, A1], 1.0)
    sample.rollout._extend([31, 32, 33], [False] * 3, [0.0] * 3)
    (batch,) = make_batches(split_balanced([sample], 1), StepInfo(0, denominators(2), 0))
    assert batch.input_ids.tolist() == [[P0, P1, A0]]
    assert batch.lengths == (3,)
    assert num_computed_tokens([sample], True) == 3


def siblings(item: int, prompt: list[int], *completions: list[int]):
    samples = [make_sample(prompt, completion, 1.0) for completion in completions]
    for sample in samples:
        sample.rollout.item_index = item
    return samples


def test_siblings_stay_together_where_they_share_a_prefix():
    first, second = siblings(0, [1, 2, 3], [5, 6], [7, 8, 9]), siblings(1, [4], [5, 6], [5, 7])
    (part,) = split_balanced([first[0], second[0], second[1], first[1]], 1, shares_prefix=True)
    assert sorted(part, key=len) == [first, second]
    (batch,) = make_batches([part], StepInfo(0, denominators(1), 0))
    # for the second item also the 5 that both sampled: the common tokens, not only the prompt
    assert batch.groups == (PrefixGroup(2, 3), PrefixGroup(2, 2))
    assert batch.lengths == (4, 5, 2, 2)
    assert [num_computed_tokens(unit, True) for unit in part] == [3 + 1 + 2, 2]
    assert [num_computed_tokens(unit, False) for unit in part] == [4 + 5, 2 + 2]


def test_groups_are_halved_until_every_micro_batch_has_rows():
    group = siblings(0, [1, 2, 3], *([5 + row, 6, 7] for row in range(5)))
    parts = split_balanced(group, 3, shares_prefix=True)
    assert sorted(len(unit) for part in parts for unit in part) == [1, 2, 2]
    assert all(len(part) == 1 for part in parts)
    single = split_balanced(group[:1], 2, shares_prefix=True)
    assert sorted(len(part) for part in single) == [0, 1]


def test_a_micro_batch_without_rows_is_padding_and_trains_nothing():
    batches = make_batches(split_balanced([make_sample([P0], [A0], 1.0)], 3), StepInfo(0, denominators(1), 0))
    assert len(batches) == 3
    assert [int(batch.loss_mask.sum()) for batch in batches] == [1, 0, 0]
    assert all(batch.input_ids.shape == (1, 1) for batch in batches)


def test_denominators_count_sampled_tokens_and_rows_that_have_some():
    samples = [make_sample([1, 2], [3, 4, 5], 0.0), make_sample([1], [3], 0.0), make_sample([1], [], 0.0)]
    counted = count_denominators(samples, max_completion_tokens=9)
    assert (counted.num_tokens, counted.num_rollouts, counted.max_completion_tokens) == (4, 2, 9)


def test_values_of_sampled_tokens_are_at_the_positions_of_their_labels():
    # P0 A0 | environment token 31 | A1: the label positions of A0 and A1 are 0 and 2
    rollout = make_sample([P0], [A0], 0.0).rollout
    rollout._extend([31], [False], [0.0])
    rollout._extend([A1], [True], [-0.5])
    sample = Sample(rollout, advantages=(0.25, 0.75), old_values=(1.0, 2.0), value_targets=(3.0, 4.0))
    batch = make_batches(split_balanced([sample], 1), StepInfo(0, denominators(2), 0))[0]
    assert batch.labels.tolist() == [[A0, 31, A1]]
    assert batch.advantages.tolist() == [[0.25, 0.0, 0.75]]
    assert batch.old_values.tolist() == [[1.0, 0.0, 2.0]]
    assert batch.value_targets.tolist() == [[3.0, 0.0, 4.0]]


def test_a_batch_moves_with_all_its_tensors():
    sample = Sample(make_sample([P0], [A0], 1.0).rollout, (1.0,), (0.0,), (1.0,))
    batch = make_batches(split_balanced([sample], 1), StepInfo(0, denominators(1), 0))[0].to("meta")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8  # a row without values would have 6
    assert all(tensor.device.type == "meta" for tensor in tensors)
