"""Fingerprints of weights change with every change of a value, and only then."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuchsia_pl.policy.contents import fingerprint


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, 2**31), st.integers(0, 3), st.integers(0, 5), st.floats(-2.0, 2.0, width=32))
def test_a_change_of_one_value_is_seen_and_a_copy_is_not(seed, number, place, value):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.nn.Parameter(torch.randn(2, 3, generator=generator)) for _ in range(4)]
    before = fingerprint(weights)
    assert fingerprint([weight.detach().clone() for weight in weights]) == before
    old = float(weights[number].detach().flatten()[place])
    weights[number].data.view(-1)[place] = value
    assert (fingerprint(weights) == before) == (old == value)
    weights[number].data.view(-1)[place] = old
    assert fingerprint(weights) == before


def test_changes_that_leave_sums_and_parities_as_they_were_are_seen():
    weight = torch.arange(1.0, 9.0)
    zeros = torch.zeros(8)
    others = [weight.flip(0), weight.roll(1), -weight, torch.full((8,), 0.01), torch.full((8,), -0.01), zeros]
    found = {fingerprint([other]) for other in [weight, *others]}
    assert len(found) == 7
    signs = zeros.clone()
    signs[[1, 2]] = -0.0  # two changes of the same bit
    assert fingerprint([signs]) != fingerprint([zeros])


def test_a_shard_without_values_counts_for_nothing():
    """If a weight is smaller than the number of ranks, some ranks have no part of it."""
    weight = torch.ones(3)
    assert fingerprint([torch.empty(0, 4), weight]) == fingerprint([weight])
    assert fingerprint([]) == fingerprint([torch.empty(0)]) == ()
