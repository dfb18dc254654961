import math

import pytest
import torch

from fuchsia_pl.objectives.kl import kl_estimate, kl_k1, kl_k2, kl_k3, kl_k3_unbiased

# Two tokens: the policy has (0.8, 0.2), the reference (0.5, 0.5).
POLICY = torch.tensor([0.8, 0.2], dtype=torch.float64)
LOG_POLICY, LOG_REFERENCE = POLICY.log(), torch.tensor([0.5, 0.5], dtype=torch.float64).log()
# KL = 0.8 ln(0.8 / 0.5) + 0.2 ln(0.2 / 0.5) = 0.8 * 0.47000363 - 0.2 * 0.91629073 = 0.19274476
EXACT = 0.19274476


def test_each_estimator_by_hand_on_the_first_token():
    # d = ln 0.5 - ln 0.8 = -0.47000363; k1 = 0.47000363; k2 = d^2 / 2 = 0.11045171; k3 = 0.625 - 1 + 0.47000363
    values = [kl(LOG_POLICY, LOG_REFERENCE)[0].item() for kl in (kl_k1, kl_k2, kl_k3)]
    assert values == pytest.approx([0.47000363, 0.11045171, 0.09500363], abs=1e-8)


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3_unbiased"])
def test_k1_and_k3_are_unbiased(estimator):
    assert (POLICY * kl_estimate(estimator, LOG_POLICY, LOG_REFERENCE, LOG_POLICY)).sum().item() == pytest.approx(
        EXACT, abs=1e-8
    )


def test_k2_is_biased_by_what_its_formula_says():
    # 0.8 * 0.47000363^2 / 2 + 0.2 * 0.91629073^2 / 2 = 0.08836137 + 0.08395887
    assert (POLICY * kl_k2(LOG_POLICY, LOG_REFERENCE)).sum().item() == pytest.approx(0.17232024, abs=1e-8)


def test_k3_is_never_negative_and_zero_where_equal():
    differences = torch.linspace(-3, 3, 61, dtype=torch.float64)
    assert (kl_k3(torch.zeros_like(differences), differences) >= 0).all()
    assert kl_k3(LOG_POLICY, LOG_POLICY).tolist() == [0.0, 0.0]


def expected_gradient(estimator: str) -> torch.Tensor:
    """The mean over the policy of the gradient of the estimator by the policy's logits."""
    logits = LOG_POLICY.clone().requires_grad_()
    estimates = kl_estimate(estimator, torch.log_softmax(logits, dim=0), LOG_REFERENCE, LOG_POLICY)
    (POLICY * estimates).sum().backward()
    return logits.grad


def test_gradients_in_the_loss_are_those_documented():
    # dKL/dlogit_0 = p0 (ln(p0 / q0) - KL) = 0.8 (0.47000363 - 0.19274476) = 0.22180710, and minus that for the other.
    true_gradient = torch.tensor([0.22180710, -0.22180710], dtype=torch.float64)
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(expected_gradient("k2"), true_gradient, atol=1e-7, rtol=0)
    torch.testing.assert_close(expected_gradient("k3_unbiased"), true_gradient, atol=1e-7, rtol=0)
    # k3: sum_i p_i (1 - q_i / p_i) dlogp_i = -sum_i q_i dlogp_i = p - q = (0.3, -0.3): the gradient of the reverse KL.
    torch.testing.assert_close(expected_gradient("k3"), torch.tensor([0.3, -0.3], dtype=torch.float64))


def test_a_token_far_from_the_reference_stays_finite():
    policy = torch.tensor([-500.0], requires_grad=True)
    value = kl_k3(policy, torch.tensor([-0.1]))
    value.sum().backward()
    assert math.isfinite(value.item())
    assert policy.grad.item() == 0.0  # no gradient; a positive one would push it further away


def test_k3_pulls_up_to_its_bound():
    policy = torch.tensor([-19.0], requires_grad=True)
    kl_k3(policy, torch.tensor([0.0])).sum().backward()
    # 1 - e^19
    assert policy.grad.item() == pytest.approx(-178482299.96, rel=1e-6)


def test_the_unbiased_form_by_hand_on_a_token_of_another_policy():
    # pi 0.8, old 0.4: r = 2; k3 = 0.09500363 as above. Gradient by logp: r k3 + r (1 - e^d) = 0.19000726 + 2 (1 - 0.625)
    policy = LOG_POLICY[:1].clone().requires_grad_()
    old = torch.tensor([0.4], dtype=torch.float64).log()
    value = kl_k3_unbiased(policy, LOG_REFERENCE[:1], old)
    value.sum().backward()
    assert value.item() == pytest.approx(0.19000726, abs=1e-7)
    assert policy.grad.item() == pytest.approx(0.94000726, abs=1e-7)


def test_a_huge_ratio_stays_finite():
    policy = torch.tensor([0.0], requires_grad=True)
    value = kl_k3_unbiased(policy, torch.tensor([-0.5]), torch.tensor([-500.0]))
    value.sum().backward()
    assert value.isfinite().all()
    assert policy.grad.isfinite().all()
