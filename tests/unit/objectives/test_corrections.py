import math

import pytest
import torch

from fuchsia_pl.objectives.corrections import SamplerCorrection, bounded_weights, sampler_ratio

# Two rows of 2 and 1 sampled tokens. trainer - sampler: ln 2 and ln 1/8 (sum ln 1/4, mean ln 1/2), and ln 3.
TRAINER = torch.tensor([[math.log(0.8), math.log(0.1), 0.0], [math.log(0.9), 0.0, 0.0]])
SAMPLER = torch.tensor([[math.log(0.4), math.log(0.8), 0.0], [math.log(0.3), 0.0, 0.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("level", "first_row", "second_row"),
    [("token", [2.0, 0.125], 3.0), ("sequence", [0.25, 0.25], 3.0), ("geometric", [0.5, 0.5], 3.0)],
)
def test_the_ratio_of_each_level_by_hand(level, first_row, second_row):
    ratio = sampler_ratio(level, TRAINER, SAMPLER, MASK)
    torch.testing.assert_close(ratio[0, :2], torch.tensor(first_row))
    torch.testing.assert_close(ratio[1, 0], torch.tensor(second_row))


def test_no_gradient_flows_through_a_correction():
    assert not sampler_ratio("sequence", TRAINER.clone().requires_grad_(), SAMPLER, MASK).requires_grad


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_a_row_without_kept_tokens_has_the_ratio_one(level):
    nothing = torch.zeros_like(MASK)
    assert (sampler_ratio(level, TRAINER, SAMPLER, nothing) == 1.0).all()


@pytest.mark.parametrize(
    ("mode", "expected"),
    # both sides of each bound: below and just above 0.5, just below and above 2
    [("disabled", [1.0] * 5), ("truncate", [0.5, 0.51, 1.0, 1.99, 2.0]), ("mask", [0.0, 0.51, 1.0, 1.99, 0.0])],
)
def test_weights_on_both_sides_of_each_bound(mode, expected):
    ratio = torch.tensor([0.49, 0.51, 1.0, 1.99, 2.01])
    torch.testing.assert_close(bounded_weights(mode, ratio, 0.5, 2.0), torch.tensor(expected))


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_an_unknown_sampling_logprob_is_seen_and_never_becomes_a_weight(mode, level):
    sampler = SAMPLER.clone()
    sampler[0, 0] = float("nan")
    weights = bounded_weights(mode, sampler_ratio(level, TRAINER, sampler, MASK), 0.0, 2.0)
    assert weights[0, 0].isnan()
    assert not weights[1].isnan().any()
    # where the policy sampled nothing it does not matter
    hidden = torch.where(MASK, SAMPLER, float("nan"))
    assert sampler_ratio(level, TRAINER, hidden, MASK).isfinite().all()


def test_a_huge_ratio_is_finite_and_bounded():
    ratio = sampler_ratio("sequence", torch.zeros(1, 2), torch.full((1, 2), -400.0), torch.ones(1, 2).bool())
    assert ratio.isfinite().all()
    assert bounded_weights("truncate", ratio, 0.0, 2.0).tolist() == [[2.0, 2.0]]
    assert bounded_weights("mask", ratio, 0.0, 2.0).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("bounds", [(-0.1, 2.0), (1.0, 2.0), (0.5, 1.0)])
def test_bounds_that_exclude_agreement_are_refused(bounds):
    with pytest.raises(ValueError, match=r"needs 0 <= low < 1 < high, got low="):
        SamplerCorrection(low=bounds[0], high=bounds[1])
