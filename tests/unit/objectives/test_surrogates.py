import math

import pytest
import torch

from fuchsia_pl.objectives.surrogates import clipped_surrogate

LOW, HIGH = 0.2, 0.28


def surrogate(ratio: float, advantage: float) -> tuple[float, float, bool]:
    """Loss, its derivative by the logprob, and whether the clip took that away, of one token."""
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, clipped = clipped_surrogate(log_ratio, torch.tensor([[advantage]], dtype=torch.float64), LOW, HIGH)
    loss.sum().backward()
    return loss.item(), log_ratio.grad.item(), clipped.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        # On the policy itself r = 1: L = -A, and dL/dlogp = -A r = -A.
        (1.0, 2.0, -2.0, -2.0, False),
        (1.0, -2.0, 2.0, 2.0, False),
        # A > 0, just inside the upper bound 1.28: L = -1.27 * 2, gradient -r A.
        (1.27, 2.0, -2.54, -2.54, False),
        # A > 0, above it: L = -1.28 * 2 and nothing more to gain.
        (1.29, 2.0, -2.56, 0.0, True),
        # A > 0, far below 1: the unclipped term is the smaller, so the token is still pushed up.
        (0.5, 2.0, -1.0, -1.0, False),
        # A < 0, just inside the lower bound 0.8: L = 0.81 * 2, gradient -r A = +1.62.
        (0.81, -2.0, 1.62, 1.62, False),
        # A < 0, below it: L = 0.8 * 2 and nothing more to gain.
        (0.79, -2.0, 1.6, 0.0, True),
        # A < 0 and far above 1: min picks the unclipped term, so the token is still pushed down.
        (5.0, -2.0, 10.0, 10.0, False),
        # No advantage, no loss, and nothing was clipped.
        (3.0, 0.0, 0.0, 0.0, False),
    ],
)
def test_both_sides_of_each_bound_by_hand(ratio, advantage, loss, gradient, clipped):
    got = surrogate(ratio, advantage)
    assert got[0] == pytest.approx(loss, abs=1e-12)
    assert got[1] == pytest.approx(gradient, abs=1e-12)
    assert got[2] is clipped


def test_a_huge_ratio_stays_finite():
    log_ratio = torch.tensor([[500.0]], requires_grad=True)
    loss, _ = clipped_surrogate(log_ratio, torch.tensor([[-1.0]]), LOW, HIGH)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert log_ratio.grad.isfinite().all()
