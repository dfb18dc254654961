import math

import pytest
import torch

from fuchsia_pl.objectives.surrogates import (
    SAPOSettings,
    SurrogateInputs,
    SurrogateSettings,
    cispo,
    clip,
    gmpo,
    ratio_log,
    reinforce,
    row_mean,
    sapo,
)

LOW, HIGH = 0.2, 0.28
SETTINGS = SurrogateSettings()


def inputs(log_ratio, advantages, logprobs=None, settings=SETTINGS) -> SurrogateInputs:
    """Inputs whose tokens are all sampled."""
    logprobs = torch.zeros_like(log_ratio) if logprobs is None else logprobs
    return SurrogateInputs(logprobs, log_ratio, advantages, torch.ones_like(log_ratio, dtype=torch.bool), settings)


def surrogate(ratio: float, advantage: float, dual_clip: float | None = None) -> tuple[float, float, bool]:
    """Loss, its derivative by the logprob, and whether a bound took that away, of one token."""
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    advantages, settings = torch.tensor([[advantage]], dtype=torch.float64), SurrogateSettings(LOW, HIGH, dual_clip)
    loss, clipped = clip(inputs(log_ratio, advantages, settings=settings))
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
    loss, _ = clip(inputs(log_ratio, torch.tensor([[-1.0]]), settings=SurrogateSettings(LOW, HIGH)))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert log_ratio.grad.isfinite().all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        # A < 0, just inside c = 3: L = 2.99 * 2, as without the dual clip.
        (2.99, -2.0, 5.98, 5.98, False),
        # A < 0, beyond it: L = 3 * 2 and no gradient.
        (3.01, -2.0, 6.0, 0.0, True),
        # A > 0: the third bound is not for it; the upper one acts.
        (3.01, 2.0, -2.56, 0.0, True),
        # A < 0 below the lower bound: as without.
        (0.5, -2.0, 1.6, 0.0, True),
        (1.0, -2.0, 2.0, 2.0, False),
    ],
)
def test_the_dual_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    got = surrogate(ratio, advantage, dual_clip=3.0)
    assert got[0] == pytest.approx(loss, abs=1e-12)
    assert got[1] == pytest.approx(gradient, abs=1e-12)
    assert got[2] is clipped


def test_a_dual_clip_out_of_reach_is_the_clip():
    for ratio in (0.1, 0.79, 0.81, 1.0, 1.27, 1.29, 40.0):
        for advantage in (-1.5, 0.0, 1.5):
            assert surrogate(ratio, advantage, dual_clip=50.0) == surrogate(ratio, advantage)


def test_reinforce_by_hand():
    # L = -1.5 * -0.7 and dL/dlogp = -1.5; L = 0.5 * -0.2 and +0.5
    logprobs = torch.tensor([-0.7, -0.2], requires_grad=True)
    loss, _ = reinforce(inputs(torch.zeros(2), torch.tensor([1.5, -0.5]), logprobs))
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([1.05, -0.1]))
    assert logprobs.grad.tolist() == [-1.5, 0.5]


@pytest.mark.parametrize(
    ("ratio", "weight", "bounded"),
    # bounds 1 - 0.5 and 1 + 1: the weight is at the bound, and the gradient is -weight A either way
    [(0.49, 0.5, True), (0.51, 0.51, False), (1.0, 1.0, False), (1.99, 1.99, False), (2.01, 2.0, True)],
)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_by_hand_bounds_the_weight_and_never_loses_the_gradient(ratio, weight, bounded, advantage):
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    logprobs = torch.tensor([-0.3], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss, outside = cispo(inputs(log_ratio, advantages, logprobs, SurrogateSettings(0.5, 1.0)))
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.3 * weight * advantage)
    assert logprobs.grad.item() == pytest.approx(-weight * advantage)
    assert log_ratio.grad is None
    assert outside.item() is bounded


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # r = 1: sigmoid(0) = 1/2, L = -(4 / tau) A / 2; dL/dlogp = -4 A r s (1 - s) = -A
        (1.0, 2.0, -4.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        # A > 0, tau 1, r = 2: s = 0.73105858, L = -4 * 2 s; gradient -4 * 2 * 2 * s (1 - s) = -16 * 0.19661193
        (2.0, 2.0, -5.84846863, -3.14579093),
        # A < 0, tau 2, r = 2: s = sigmoid(2) = 0.88079708, L = (4 / 2) * 2 s; gradient 4 * 2 * 2 * 0.10499359
        (2.0, -2.0, 3.52318831, 1.67989737),
        # no advantage, no loss
        (2.0, 0.0, 0.0, 0.0),
    ],
)
def test_sapo_by_hand(ratio, advantage, loss, gradient):
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    settings = SurrogateSettings(sapo=SAPOSettings(1.0, 2.0))
    value, _ = sapo(inputs(log_ratio, torch.tensor([advantage], dtype=torch.float64), settings=settings))
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-8)
    assert log_ratio.grad.item() == pytest.approx(gradient, abs=1e-8)


@pytest.mark.parametrize(
    ("ratios", "advantages", "mean", "gradients", "clipped"),
    [
        # bounds 0.8 and 1.28. A > 0 is bounded above only: sqrt(0.5 * 1.28) = 0.8; gradient -A s / 2 within the bound
        ([0.5, 2.0], [2.0, 2.0], 0.8, [-1.6, 0.0], [False, True]),
        # A < 0 is bounded below only: sqrt(0.8 * 2) = 1.26491106; gradient 2 s, as the losses of both tokens depend on it
        ([0.5, 2.0], [-2.0, -2.0], 1.26491106, [0.0, 2.52982213], [True, False]),
        # the sign of each token's own advantage: nothing is bounded, and the two losses cancel
        ([0.5, 2.0], [2.0, -2.0], 1.0, [0.0, 0.0], [False, False]),
        # no advantage: nothing is lost, and nothing counts as clipped
        ([0.5, 2.0], [0.0, 0.0], 1.26491106, [0.0, 0.0], [False, False]),
    ],
)
def test_gmpo_by_hand(ratios, advantages, mean, gradients, clipped):
    log_ratio = torch.tensor([ratios], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([advantages], dtype=torch.float64)
    loss, bounded = gmpo(inputs(log_ratio, advantages, settings=SurrogateSettings(LOW, HIGH)))
    loss.sum().backward()
    torch.testing.assert_close(loss, -mean * advantages, rtol=1e-7, atol=1e-7)
    # each loss has the gradient -A s / 2 by each of the two tokens within their bounds, summed over both losses
    torch.testing.assert_close(log_ratio.grad, torch.tensor([gradients], dtype=torch.float64), rtol=1e-7, atol=1e-7)
    assert bounded.tolist() == [clipped]


def test_gmpo_without_a_lower_bound_keeps_every_ratio():
    log_ratio = torch.tensor([[-5.0, -3.0]])
    loss, bounded = gmpo(inputs(log_ratio, torch.tensor([[-1.0, -1.0]]), settings=SurrogateSettings(1.0, HIGH)))
    torch.testing.assert_close(loss, torch.full((1, 2), math.exp(-4.0)))
    assert not bounded.any()


def test_huge_ratios_stay_finite():
    huge, logprobs, advantage = torch.tensor([500.0]), torch.tensor([-1.0]), torch.tensor([-1.0])
    bounds = SurrogateSettings(1.0, 4.0)
    for loss in (cispo(inputs(huge, advantage, logprobs, bounds))[0], sapo(inputs(huge, advantage))[0]):
        assert loss.isfinite().all()
    rows = torch.tensor([[500.0]], requires_grad=True)
    gmpo(inputs(rows, torch.tensor([[-1.0]])))[0].sum().backward()
    assert rows.grad.isfinite().all()
    gate = torch.tensor([500.0], requires_grad=True)
    sapo(inputs(gate, advantage))[0].sum().backward()
    assert gate.grad.item() == 0.0


# Two rows of 2 and 1 sampled tokens: log ratios 0.4 and 0.2 with a mean of 0.3 (a sum would be 0.6), and -0.1.
LOGPROBS = torch.tensor([[-0.6, -0.8, 0.0], [-1.1, 0.0, 0.0]])
OLD = torch.tensor([[-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_the_ratio_of_each_level_by_hand():
    token, sequence = ratio_log("token", LOGPROBS, OLD, MASK), ratio_log("sequence", LOGPROBS, OLD, MASK)
    torch.testing.assert_close(token, torch.tensor([[0.4, 0.2, 0.0], [-0.1, 0.0, 0.0]]))
    torch.testing.assert_close(sequence, torch.tensor([[0.3, 0.3, 0.3], [-0.1, -0.1, -0.1]]))
    torch.testing.assert_close(ratio_log("sequence_token", LOGPROBS, OLD, MASK), sequence)


def test_the_gradient_of_each_level_by_hand():
    # Gradient of the sum over kept positions. sequence: the mean of both tokens is at both positions: 2 * 1/2 each. With the
    # weights 1 and 3 the sequence form gives both tokens (1 + 3) / 2, the token form each its own.
    weights = torch.tensor([[1.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
    expected = {
        "token": [[1.0, 3.0, 0.0], [1.0, 0.0, 0.0]],
        "sequence": [[2.0, 2.0, 0.0], [1.0, 0.0, 0.0]],
        "sequence_token": [[1.0, 3.0, 0.0], [1.0, 0.0, 0.0]],
    }
    for level, gradient in expected.items():
        logprobs = LOGPROBS.clone().requires_grad_()
        (ratio_log(level, logprobs, OLD, MASK) * weights).sum().backward()
        torch.testing.assert_close(logprobs.grad, torch.tensor(gradient))


def test_a_row_without_kept_tokens_has_a_mean_of_zero():
    values = torch.tensor([[float("nan"), 5.0], [4.0, 2.0]])
    mask = torch.tensor([[False, False], [True, True]])
    assert row_mean(values, mask).tolist() == [[0.0], [3.0]]
