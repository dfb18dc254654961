"""The first tokens of a micro-batch: its shapes by hand, and the outputs of a model."""

import pytest
import torch

from fuchsia_pl.batch import PrefixGroup, StepInfo
from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.rollouts.batcher import make_batches
from tests.doubles import denominators, make_sample

# Prompt, completion. Input positions are one fewer than tokens: 4, 5, 3 and 6.
ROWS = [([5, 6, 7], [8, 2]), ([5, 6, 7], [9, 10, 2]), ([11, 12], [13, 2]), ([14], [15, 16, 17, 18, 19, 2])]


def make_batch():
    samples = [make_sample(prompt, own, advantage=1.0 + row) for row, (prompt, own) in enumerate(ROWS)]
    return make_batches([[samples[:2], samples[2:3], samples[3:]]], StepInfo(0, denominators(13), 0))[0]


def test_rows_end_at_the_token_of_the_given_number():
    batch = make_batch()
    assert batch.loss_mask.sum(1).tolist() == [2, 3, 2, 6]
    head = batch.head(4)  # both tokens of the first row and two of the second
    assert head.lengths == (4, 4)
    assert head.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 7, 9]]
    assert head.labels.tolist() == [[6, 7, 8, 2], [6, 7, 9, 10]]
    assert head.loss_mask.tolist() == [[False, False, True, True], [False, False, True, True]]
    assert head.groups == (PrefixGroup(2, 3),)
    assert head.advantages.tolist() == [[0, 0, 1, 1], [0, 0, 2, 2]]
    assert (len(head.temperatures), len(head.samples)) == (2, 2)


def test_a_row_that_ends_within_its_prefix_shortens_the_prefix_and_a_single_row_is_all_prefix():
    batch = make_batch()
    assert batch.head(1).groups == (PrefixGroup(1, 3),)
    third = batch.head(3)  # the second row ends at its first sampled label, in front of its own inputs
    assert (third.lengths, third.groups) == ((4, 3), (PrefixGroup(2, 3),))
    sixth = batch.head(6)
    assert (sixth.lengths, sixth.groups) == ((4, 5, 2), (PrefixGroup(2, 3), PrefixGroup(1, 2)))
    assert sixth.input_ids.shape == (3, 5)


@pytest.mark.parametrize("num_tokens", [13, 14, 1000])
def test_a_batch_without_more_tokens_is_returned_itself(num_tokens):
    batch = make_batch()
    assert batch.head(num_tokens) is batch


@pytest.mark.parametrize("shared", ["always", "never"])
def test_the_outputs_of_the_rest_do_not_change(tiny_model, shared):
    config = PolicyConfig("", "float32", LoRASettings(r=4, alpha=8), shared_prefix=shared)
    policy, batch = Policy(config, tiny_model, with_reference=False), make_batch()
    whole = policy.evaluated_output(batch).logprobs
    for num_tokens in range(1, 14):
        head = batch.head(num_tokens)
        rows, positions = head.loss_mask.shape
        assert head.loss_mask.sum() == num_tokens
        found = policy.evaluated_output(head).logprobs[head.loss_mask]
        torch.testing.assert_close(found, whole[:rows, :positions][head.loss_mask], rtol=1e-5, atol=1e-5)
        # The first tokens in the order of rows.
        assert torch.equal(head.labels[head.loss_mask], batch.labels[batch.loss_mask][:num_tokens])
