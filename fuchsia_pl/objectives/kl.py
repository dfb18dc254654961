"""Estimators of KL(policy || reference), each from one sampled token.

With d = ref_logprobs - policy_logprobs. Source of k1, k2, k3: J. Schulman, "Approximating KL divergence" (2020),
http://joschu.net/blog/kl-approx.html.

In the loss the *gradient* of an estimator matters. It should be the gradient of the KL of each token's distribution, given the
tokens before it. k1: its expectation is 0, it only adds noise. k2: it is that gradient while the policy is the one that
sampled. k3: it is the gradient of the reverse KL, and the usual choice (DeepSeekMath, arXiv:2402.03300, equation 4).
"k3_unbiased": value and gradient are those of the KL at any policy. In the reward k1 gives the gradient of the KL of whole
sequences, which includes a token's effect on later ones; k2 and k3 do not (near the reference the effect of k3 is almost 0).
"""

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "k3_unbiased"]

# exp(20) is 5e8: a token this far from the reference is a fault that the metric must show, and must not overflow. Beyond the
# bound both terms are constant: with one of them alone the gradient would point away from the reference.
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
    return difference.expm1() - difference  # near 0, exp(d) - 1 has no correct digits


def kl_k3_unbiased(policy_logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Ratio times k3, r = pi / pi_old, with gradient through both: an importance-sampled k3.

    Since E_old[r f] = E_pi[f], its mean is the KL of the current policy, and so is its gradient: at ratio 1,
    grad = (k3 + d k3/d logp) grad logp = -d grad logp. Source: DeepSeek-V3.2, arXiv:2512.02556, equation 7. The ratio is always
    the token's own (TRL uses the surrogate's ratio, which per sequence is another estimator).
    """
    ratio = (policy_logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO).exp()
    return ratio * kl_k3(policy_logprobs, ref_logprobs)


def kl_estimate(estimator: KLEstimator, policy_logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Estimate per token.

    Args:
        estimator: Name of the estimator.
        policy_logprobs: [B, T], with gradient.
        ref_logprobs: [B, T].
        old_logprobs: [B, T], denominator of the ratio; only "k3_unbiased" reads them.

    Returns:
        [B, T].
    """
    match estimator:
        case "k1":
            return kl_k1(policy_logprobs, ref_logprobs)
        case "k2":
            return kl_k2(policy_logprobs, ref_logprobs)
        case "k3":
            return kl_k3(policy_logprobs, ref_logprobs)
        case "k3_unbiased":
            return kl_k3_unbiased(policy_logprobs, ref_logprobs, old_logprobs)
