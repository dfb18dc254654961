"""Tests whether an adapter changes the logprobs of an engine as it changes those of the trainer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CONCLUSIVE_ERROR = 0.1
CONCLUSIVE_NOISE = 0.5
CONCLUSIVE_TOKENS = 12
ALLOWED_DEVIATION = 0.5


@dataclass(frozen=True)
class Agreement:
    """The share of the adapter's effect that is found in the engine.

    Attributes:
        slope: 1 where the engine applies the adapter, 0 where it does not, 2 where it applies it twice.
        error: Standard error of the slope; infinite if the adapter has no effect yet.
        noise: Residual per token, relative to the larger of the effects in trainer and engine (root mean squares).
        num_effective: Effective number of tokens: all of them if the effect is even, 1 if a single token has all of it.

    >>> Agreement(0.0, 0.05, 0.1, num_effective=90).holds, Agreement(0.9, 0.05, 0.1, num_effective=90).holds
    (False, True)
    """

    slope: float
    error: float
    noise: float
    num_effective: float

    @property
    def is_conclusive(self) -> bool:
        """Whether the adapter's effect exceeds the rounding, over all tokens and on each.

        Many tokens reduce the error but not the bias: both sides of the regression are rounded, and the slope of noise on
        noise is near 1/2 for any engine. If a few tokens have all of the effect, a weak adapter changed a choice
        between two tokens of almost equal probability, and neither error nor noise is meaningful.
        """
        spread = self.num_effective >= CONCLUSIVE_TOKENS
        return spread and self.error < CONCLUSIVE_ERROR and self.noise < CONCLUSIVE_NOISE

    @property
    def lacks_tokens(self) -> bool:
        """Whether more tokens may make the result conclusive. They do not help against rounding, which is in each of them."""
        return self.noise < CONCLUSIVE_NOISE and not self.is_conclusive

    @property
    def holds(self) -> bool:
        """Whether the slope is nearer to 1 than to 0 or 2."""
        return abs(self.slope - 1.0) < ALLOWED_DEVIATION


def adapter_agreement(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    sampling_logprobs: Tensor,
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Agreement:
    """Least squares of (sampling - ref) on (policy - ref), through the origin.

    slope = sum(x y) / sum(x^2), error = sqrt(mean((y - slope x)^2) / sum(x^2)), and noise = sqrt(mean((y - slope x)^2) /
    max(mean(x^2), mean(y^2))), num_effective = sum(x^2)^2 / sum(x^4). Here x = policy - ref is the adapter's effect in the
    trainer and y = sampling - ref its effect in the engine.

    Args:
        policy_logprobs: [N], adapter on.
        ref_logprobs: [N], adapter off.
        sampling_logprobs: [N], from the engine.
        add_up: Sums a tensor over the ranks, since each has some of the tokens. All ranks get the same result.
    """
    effect = (policy_logprobs - ref_logprobs).double()
    observed = (sampling_logprobs - ref_logprobs).double()
    moments = [torch.ones_like(effect), effect.square(), effect * observed, observed.square(), effect.pow(4)]
    number, power, product, observed_power, fourth = add_up(torch.stack([m.sum() for m in moments])).tolist()
    if power == 0.0:
        return Agreement(slope=0.0, error=float("inf"), noise=float("inf"), num_effective=0.0)
    slope = product / power
    # The mean of (y - slope x)^2. Rounding can make it negative if x and y are equal.
    residual = max(observed_power - slope * product, 0.0) / number
    largest = max(power, observed_power) / number
    num_effective = power**2 / fourth
    return Agreement(slope, (residual / power) ** 0.5, (residual / largest) ** 0.5, num_effective)
