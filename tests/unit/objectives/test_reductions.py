import pytest
import torch

from fuchsia_pl.objectives.reductions import constant, reduce, sequence_mean, token_mean
from tests.doubles import denominators

# Row 0 keeps 1 and 3, row 1 keeps 8.
VALUES = torch.tensor([[1.0, 3.0, 100.0], [8.0, 100.0, 100.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_token_mean_by_hand():
    # (1 + 3 + 8) / 3
    assert token_mean(VALUES, MASK, num_tokens=3).item() == 4.0


def test_sequence_mean_by_hand():
    # ((1 + 3) / 2 + 8 / 1) / 2
    assert sequence_mean(VALUES, MASK, num_rollouts=2).item() == 5.0


def test_rows_of_one_rollout_are_one_sequence_by_hand():
    # Both rows are of one rollout, whose tokens 1, 3 and 8 have the mean 4. As two sequences they would have 5.
    other = torch.tensor([1, 2])
    assert sequence_mean(VALUES, MASK, num_rollouts=1, other_tokens=other).item() == 4.0
    whole = denominators(num_tokens=3, num_rollouts=1)
    assert reduce(VALUES, MASK, "sequence_mean", whole, None, other).item() == 4.0
    # In different micro-batches, each row has its share: (1 + 3) / 3 and 8 / 3.
    shares = [
        reduce(VALUES[r : r + 1], MASK[r : r + 1], "sequence_mean", whole, None, other[r : r + 1]) for r in (0, 1)
    ]
    assert [share.item() for share in shares] == pytest.approx([4 / 3, 8 / 3])


def test_constant_by_hand_ignores_lengths():
    # (1 + 3 + 8) / (2 rows * 4 tokens), and the same when the rows are padded to twice the length
    assert constant(VALUES, MASK, num_rollouts=2, length=4).item() == 1.5
    values, mask = torch.cat([VALUES, VALUES], dim=1), torch.cat([MASK, torch.zeros_like(MASK)], dim=1)
    assert constant(values, mask, num_rollouts=2, length=4).item() == 1.5


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_shares_of_micro_batches_add_up(reduction):
    whole = denominators(num_tokens=3, num_rollouts=2)
    parts = [reduce(VALUES[row : row + 1], MASK[row : row + 1], reduction, whole, None) for row in range(2)]
    torch.testing.assert_close(sum(parts), reduce(VALUES, MASK, reduction, whole, None))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_what_the_mask_hides_has_no_value_and_no_gradient(reduction):
    values = torch.where(MASK, VALUES, float("nan")).requires_grad_()
    loss = reduce(values, MASK, reduction, denominators(num_tokens=3, num_rollouts=2), None)
    loss.backward()
    assert loss.isfinite()
    assert (values.grad[~MASK] == 0).all()
    assert (values.grad[MASK] > 0).all()


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_no_kept_token_is_zero_with_a_graph(reduction):
    values = VALUES.clone().requires_grad_()
    loss = reduce(values, torch.zeros_like(MASK), reduction, denominators(num_tokens=0, num_rollouts=0), None)
    loss.backward()
    assert loss.item() == 0.0
    assert (values.grad == 0).all()


def test_the_length_of_constant_is_the_longest_allowed_unless_it_is_set():
    # sum 12 over 2 rows: 12 / (2 * 8) with the doubles' longest completion of 8, 12 / (2 * 1) as the sum over tokens
    whole = denominators(num_tokens=3, num_rollouts=2, max_completion_tokens=8)
    assert reduce(VALUES, MASK, "constant", whole, None).item() == 0.75
    assert reduce(VALUES, MASK, "constant", whole, 1).item() == 6.0


@pytest.mark.parametrize(("reduction", "expected"), [("token_mean", 7.0), ("sequence_mean", 7.0), ("constant", 0.875)])
def test_one_kept_token_by_hand(reduction, expected):
    # 7 / 1 token, 7 / 1 token / 1 row, 7 / (1 row * 8)
    mask = torch.tensor([[False, True]])
    assert reduce(torch.tensor([[5.0, 7.0]]), mask, reduction, denominators(1), None).item() == expected
