"""Estimators of KL(policy || reference) from one sampled token each.

With d = ref_logprobs - policy_logprobs. Source: J. Schulman, "Approximating KL divergence" (2020),
http://joschu.net/blog/kl-approx.html. All three are applied in the loss, so their *gradient* matters too: k1's has
expectation 0 and only adds noise, k2's is the gradient of the KL at the sampling policy, k3's is not, but it is bounded
below and the usual choice (DeepSeekMath, arXiv:2402.03300, equation 4).
"""

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]

# exp(20) is 5e8: a token this far from the reference is a fault to be seen in the metric, not an overflow. Beyond the bound
# both terms stand still: with one of them alone the gradient would point away from the reference.
MAX_LOG_RATIO = 20.0


def kl_k1(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """-d: unbiased, high variance, negative for half of the tokens."""
    return policy_logprobs - ref_logprobs


def kl_k2(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2: biased, low variance."""
    return 0.5 * (ref_logprobs - policy_logprobs).square()


def kl_k3(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - 1 - d: unbiased, low variance, never negative."""
    difference = (ref_logprobs - policy_logprobs).clamp(max=MAX_LOG_RATIO)
    return difference.exp() - 1.0 - difference


def kl_estimate(estimator: KLEstimator, policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The named estimator per token, [B, T]."""
    match estimator:
        case "k1":
            return kl_k1(policy_logprobs, ref_logprobs)
        case "k2":
            return kl_k2(policy_logprobs, ref_logprobs)
        case "k3":
            return kl_k3(policy_logprobs, ref_logprobs)
