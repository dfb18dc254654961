"""Whether an engine does to logprobs what the adapter does to them in the trainer."""

from dataclasses import dataclass

from torch import Tensor

CONCLUSIVE_ERROR = 0.1
ALLOWED_DEVIATION = 0.5


@dataclass(frozen=True)
class Agreement:
    """The share of the adapter's effect that the engine shows.

    Attributes:
        slope: 1 where the engine applies the adapter, 0 where it does not, 2 where it applies it twice.
        error: Standard error of the slope; infinite where the adapter has no effect yet.

    >>> Agreement(slope=0.0, error=0.05).holds, Agreement(slope=0.9, error=0.05).holds
    (False, True)
    """

    slope: float
    error: float

    @property
    def is_conclusive(self) -> bool:
        """Whether the adapter's effect stands out of the rounding."""
        return self.error < CONCLUSIVE_ERROR

    @property
    def holds(self) -> bool:
        """Whether the slope is nearer to 1 than to 0 or 2."""
        return abs(self.slope - 1.0) < ALLOWED_DEVIATION


def adapter_agreement(policy_logprobs: Tensor, ref_logprobs: Tensor, sampling_logprobs: Tensor) -> Agreement:
    """Least squares of (sampling - ref) on (policy - ref), through the origin.

    slope = sum(x y) / sum(x^2) and error = sqrt(mean((y - slope x)^2) / sum(x^2)), with x = policy - ref, what the adapter
    does in the trainer, and y = sampling - ref, what it does in the engine.

    Args:
        policy_logprobs: [N], adapter on.
        ref_logprobs: [N], adapter off.
        sampling_logprobs: [N], the engine's.
    """
    effect = (policy_logprobs - ref_logprobs).double()
    observed = (sampling_logprobs - ref_logprobs).double()
    power = effect.square().sum().item()
    if power == 0.0:
        return Agreement(slope=0.0, error=float("inf"))
    slope = (effect * observed).sum().item() / power
    residual = (observed - slope * effect).square().mean().item()
    return Agreement(slope, (residual / power) ** 0.5)
