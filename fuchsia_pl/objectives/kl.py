"""Estimators of KL(policy || reference) from one sampled token each.

With d = ref_logprobs - policy_logprobs. Source of k1, k2, k3: J. Schulman, "Approximating KL divergence" (2020),
http://joschu.net/blog/kl-approx.html.

In the loss its *gradient* matters, and it is that of the KL of each token's distribution, given what came before: k1's has
expectation 0 and only adds noise, k2's is the gradient of the KL as long as the policy is the one that sampled, k3's is not
that gradient (it is that of the KL the other way round) but the usual choice (DeepSeekMath, arXiv:2402.03300, equation 4), and
"k3_unbiased" has the value and the gradient of the KL at any policy. In the reward k1 gives the gradient of the KL of whole
sequences, a token's effect on later ones included; k2 and k3 there do not (near the reference k3 hardly pulls at all).
"""

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "k3_unbiased"]

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


def kl_k3_unbiased(policy_logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Ratio times k3, r = pi / pi_old, with gradient through both: an importance-sampled k3.

    Since E_old[r f] = E_pi[f], its mean is the KL of the policy at hand, and so is its gradient: on the policy that sampled,
    grad = (k3 + d k3/d logp) grad logp = -d grad logp. Source: DeepSeek-V3.2, arXiv:2512.02556, equation 7. The ratio is the
    token's own whatever the surrogate's is (TRL multiplies by the surrogate's, which per sequence is another estimator).
    """
    ratio = (policy_logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO).exp()
    return ratio * kl_k3(policy_logprobs, ref_logprobs)


def kl_estimate(estimator: KLEstimator, policy_logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """The named estimator per token.

    Args:
        estimator: Which one.
        policy_logprobs: [B, T], with gradient.
        ref_logprobs: [B, T].
        old_logprobs: [B, T], of the policy that sampled; only "k3_unbiased" looks at them.

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
