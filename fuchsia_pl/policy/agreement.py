"""Whether an engine does to logprobs what the adapter does to them in the trainer."""

from dataclasses import dataclass

from torch import Tensor

CONCLUSIVE_ERROR = 0.1
CONCLUSIVE_NOISE = 0.5
ALLOWED_DEVIATION = 0.5


@dataclass(frozen=True)
class Agreement:
    """The share of the adapter's effect that the engine shows.

    Attributes:
        slope: 1 where the engine applies the adapter, 0 where it does not, 2 where it applies it twice.
        error: Standard error of the slope; infinite where the adapter has no effect yet.
        noise: What the slope leaves unexplained of a token, relative to the larger of the effects in trainer and engine; root
            mean squares.

    >>> Agreement(slope=0.0, error=0.05, noise=0.1).holds, Agreement(slope=0.9, error=0.05, noise=0.1).holds
    (False, True)
    """

    slope: float
    error: float
    noise: float

    @property
    def is_conclusive(self) -> bool:
        """Whether the adapter's effect stands out of the rounding, over all tokens and on each.

        Many tokens make the error small, but not the bias: both sides of the regression are rounded, and the slope of noise
        on noise lies near 1/2 whatever the engine does.
        """
        return self.error < CONCLUSIVE_ERROR and self.noise < CONCLUSIVE_NOISE

    @property
    def holds(self) -> bool:
        """Whether the slope is nearer to 1 than to 0 or 2."""
        return abs(self.slope - 1.0) < ALLOWED_DEVIATION


def adapter_agreement(policy_logprobs: Tensor, ref_logprobs: Tensor, sampling_logprobs: Tensor) -> Agreement:
    """Least squares of (sampling - ref) on (policy - ref), through the origin.

    slope = sum(x y) / sum(x^2), error = sqrt(mean((y - slope x)^2) / sum(x^2)), and noise = sqrt(mean((y - slope x)^2) /
    max(mean(x^2), mean(y^2))), with x = policy - ref, what the adapter does in the trainer, and y = sampling - ref, what it does
    in the engine.

    Args:
        policy_logprobs: [N], adapter on.
        ref_logprobs: [N], adapter off.
        sampling_logprobs: [N], the engine's.
    """
    effect = (policy_logprobs - ref_logprobs).double()
    observed = (sampling_logprobs - ref_logprobs).double()
    power = effect.square().sum().item()
    if power == 0.0:
        return Agreement(slope=0.0, error=float("inf"), noise=float("inf"))
    slope = (effect * observed).sum().item() / power
    residual = (observed - slope * effect).square().mean().item()
    largest = max(power / effect.numel(), observed.square().mean().item())
    return Agreement(slope, (residual / power) ** 0.5, (residual / largest) ** 0.5)
