"""Surrogate losses per token, before any mask or mean, and the ratios that they use.

Shape letters: B rows, T positions. A log ratio is log pi(token) - log pi_old(token).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fuchsia_pl.objectives.own import check_tensor, import_function, is_own, wrong_result
from fuchsia_pl.types import ConfigError

RatioLevel = Literal["token", "sequence", "sequence_token"]

# exp(20) is 5e8: far outside every clip bound, and still finite in float32 when multiplied by an advantage.
MAX_LOG_RATIO = 20.0


@dataclass
class SAPOSettings:
    """Settings of `surrogate: sapo`.

    Attributes:
        temperature_positive: tau where the advantage is positive.
        temperature_negative: tau elsewhere; a larger one decays faster.
    """

    temperature_positive: float = 1.0
    temperature_negative: float = 1.05

    def __post_init__(self) -> None:
        """Raises ConfigError for a temperature that is not positive."""
        for name, value in {
            "temperature_positive": self.temperature_positive,
            "temperature_negative": self.temperature_negative,
        }.items():
            if value <= 0.0:
                raise ConfigError(f"model.loss.sapo.{name} must be above 0, got {value}")


@dataclass(frozen=True)
class SurrogateSettings:
    """Settings that a surrogate may read. Their meaning is described at `LossConfig`.

    >>> SurrogateSettings(clip_high=0.28).clip_low
    0.2
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    sapo: SAPOSettings = field(default_factory=SAPOSettings)


@dataclass(frozen=True)
class SurrogateInputs:
    """Arguments of a surrogate. All tensors are [B, T] and float32, but for the mask.

    Attributes:
        logprobs: Log-probabilities of the tokens under the policy, with gradient; 0 where the mask is False.
        log_ratio: Log of the policy's ratio to the old policy at the level `ratio_level`, with gradient; any value where the
            mask is False.
        advantages: Advantage of each token; 0 where the mask is False.
        loss_mask: bool, True at the tokens that the policy sampled.
        settings: The settings.

    >>> zeros = torch.zeros(1, 2)
    >>> SurrogateInputs(zeros, zeros, zeros, zeros.bool(), SurrogateSettings()).loss_mask.shape
    torch.Size([1, 2])
    """

    logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor
    loss_mask: Tensor
    settings: SurrogateSettings


# The loss of each token [B, T], and a bool [B, T] that is True where a bound acted, for the metric `train/clip_fraction`.
SurrogateResult = tuple[Tensor, Tensor]
SurrogateFunction = Callable[[SurrogateInputs], SurrogateResult]


@dataclass(frozen=True)
class SurrogateSpec:
    """A surrogate and the settings of `LossConfig` that change its result.

    Attributes:
        function: The surrogate.
        uses: Names of those settings. Any other one is refused where it is set. "old_logprobs" is in it where the surrogate
            has a ratio: only such a surrogate can be used for several updates of one phase.

    >>> SurrogateSpec(reinforce, frozenset()).has_ratio
    False
    """

    function: SurrogateFunction
    uses: frozenset[str]

    @property
    def has_ratio(self) -> bool:
        """Whether the surrogate reads `SurrogateInputs.log_ratio`."""
        return "old_logprobs" in self.uses


def ratio_log(level: RatioLevel, policy_logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """The log ratio that a surrogate receives for each token, with gradient.

    "token": the token's own. "sequence": s = the mean over the row's sampled tokens, the same at each of them.
    "sequence_token": s in value, and in gradient the token's own, so that tokens can have different advantages. Sources:
    PPO; GSPO, arXiv:2507.18071, equations 7 and 14.

    Args:
        level: One of the three.
        policy_logprobs: [B, T].
        old_logprobs: [B, T] without gradient.
        loss_mask: bool [B, T].

    >>> policy, mask = torch.tensor([[0.3, 0.1, 0.0]]), torch.tensor([[True, True, False]])
    >>> ratio_log("sequence", policy, torch.zeros(1, 3), mask)
    tensor([[0.2000, 0.2000, 0.2000]])
    """
    log_ratio = policy_logprobs - old_logprobs
    match level:
        case "token":
            return log_ratio
        case "sequence":
            return row_mean(log_ratio, loss_mask).expand_as(log_ratio)
        case "sequence_token":
            return row_mean(log_ratio, loss_mask).detach() + policy_logprobs - policy_logprobs.detach()


def row_mean(values: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean of each row over its sampled tokens, 0 for a row without any; [B, 1]."""
    total = torch.where(loss_mask, values, 0.0).sum(dim=1, keepdim=True)
    return total / loss_mask.sum(dim=1, keepdim=True).clamp(min=1)


def reinforce(inputs: SurrogateInputs) -> SurrogateResult:
    """L_t = -A_t log pi(token). Source: R. Williams, "Simple statistical gradient-following algorithms" (1992)."""
    return -inputs.advantages * inputs.logprobs, torch.zeros_like(inputs.loss_mask)


def clip(inputs: SurrogateInputs) -> SurrogateResult:
    """The clipped surrogate of PPO with separate bounds, and a third bound for negative advantages.

    L_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A), r_t = exp(log_ratio); with `dual_clip` c, and A < 0, no more
    than -c A. Sources: PPO, arXiv:1707.06347, equation 7; separate bounds ("clip-higher"): DAPO, arXiv:2503.14476,
    equation 10; dual clip: arXiv:1912.09729.

    Returns:
        The loss, and True where a bound removed the gradient.
    """
    settings, advantages = inputs.settings, inputs.advantages
    ratio = inputs.log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    bounded = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    clipped = bounded * advantages < ratio * advantages
    gain = torch.minimum(ratio * advantages, bounded * advantages)
    if settings.dual_clip is not None:
        floor = torch.where(advantages < 0, settings.dual_clip * advantages, -torch.inf)
        clipped = clipped | (gain < floor)
        gain = torch.maximum(gain, floor)
    return -gain, clipped


def cispo(inputs: SurrogateInputs) -> SurrogateResult:
    """L_t = -sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A log pi(token): a bounded weight, and a gradient at every token.

    sg stops the gradient. With `clip_low` 1 there is no lower bound. Source: CISPO in MiniMax-M1, arXiv:2506.13585,
    equations 4 and 5.

    Returns:
        The loss, and True where the weight was bounded.
    """
    ratio = inputs.log_ratio.detach().exp()
    weight = ratio.clamp(1.0 - inputs.settings.clip_low, 1.0 + inputs.settings.clip_high)
    return -weight * inputs.advantages * inputs.logprobs, weight != ratio


def sapo(inputs: SurrogateInputs) -> SurrogateResult:
    """L_t = -(4 / tau) sigmoid(tau (r_t - 1)) A with tau by the sign of A: a soft gate instead of a hard clip.

    At ratio 1 the gradient is -A, as for REINFORCE; further away it decays smoothly. Source: SAPO, arXiv:2511.20347,
    equation 6.
    """
    settings, advantages = inputs.settings.sapo, inputs.advantages
    tau = torch.where(advantages > 0, settings.temperature_positive, settings.temperature_negative)
    ratio = inputs.log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    return -torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau) * advantages, torch.zeros_like(inputs.loss_mask)


def gmpo(inputs: SurrogateInputs) -> SurrogateResult:
    """L_t = -s A with s = the geometric mean of the row's token ratios, each bounded where A moves it past its bound.

    log s = mean over the row's tokens of min(log r_t, log(1 + clip_high)) where A > 0, of max(log r_t, log(1 - clip_low))
    elsewhere. A token beyond its bound loses its gradient; the others of the row keep theirs. Source: GMPO, arXiv:2507.20673.

    Returns:
        The loss, and True where a bound removed the token's gradient.
    """
    settings, log_ratio, advantages = inputs.settings, inputs.log_ratio, inputs.advantages
    low = math.log(1.0 - settings.clip_low) if settings.clip_low < 1.0 else -math.inf
    high = math.log(1.0 + settings.clip_high)
    bounded = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    mean_ratio = row_mean(bounded, inputs.loss_mask).clamp(max=MAX_LOG_RATIO).exp()
    return -mean_ratio * advantages, (bounded != log_ratio) & (advantages != 0)


_RATIO = {"old_logprobs", "ratio_level"}
# Settings of `LossConfig` that some surrogate does not use.
SURROGATE_SETTINGS = frozenset({*_RATIO, "clip_low", "clip_high", "dual_clip", "sapo"})
SURROGATES: Mapping[str, SurrogateSpec] = {
    "reinforce": SurrogateSpec(reinforce, frozenset()),
    "clip": SurrogateSpec(clip, frozenset({*_RATIO, "clip_low", "clip_high", "dual_clip"})),
    "cispo": SurrogateSpec(cispo, frozenset({*_RATIO, "clip_low", "clip_high"})),
    "sapo": SurrogateSpec(sapo, frozenset({*_RATIO, "sapo"})),
    "gmpo": SurrogateSpec(gmpo, frozenset({"old_logprobs", "clip_low", "clip_high"})),
}


def surrogate_spec(name: str) -> SurrogateSpec:
    """The surrogate of a name in `SURROGATES`, or of a dotted path, which may use every setting.

    Raises:
        ConfigError: There is no such name, or no such function.

    >>> surrogate_spec("sapo").function is sapo
    True
    """
    if is_own(name):
        function = import_function("model.loss.surrogate", name, ("inputs",))

        def checked(inputs: SurrogateInputs) -> SurrogateResult:
            return _check_result(name, function(inputs), inputs)

        return SurrogateSpec(checked, SURROGATE_SETTINGS)
    if name not in SURROGATES:
        raise ConfigError(
            f'model.loss.surrogate must be one of {", ".join(SURROGATES)}, or the dotted path of a function, got "{name}"'
        )
    return SURROGATES[name]


def check_surrogate(name: str, settings: SurrogateSettings) -> None:
    """Calls a user's own surrogate with an example of two rows.

    Raises:
        ConfigError: It raises an exception, or returns something else than a finite loss per token with a gradient, and a bool
            per token.
    """
    if not is_own(name):
        return
    spec = surrogate_spec(name)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logprobs = torch.tensor([[-0.5, -1.0, 0.0], [-0.1, -2.0, -0.7]], requires_grad=True)
    advantages = torch.tensor([[1.5, 1.5, 0.0], [-0.5, -0.5, -0.5]])
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            log_ratio = ratio_log("token", logprobs, torch.where(mask, logprobs.detach() - 0.1, 0.0), mask)
            loss, _ = spec.function(SurrogateInputs(logprobs, log_ratio, advantages, mask, settings))
    except ConfigError:
        raise
    except Exception as error:  # user code may raise anything
        raise wrong_result("model.loss.surrogate", name, f"raised {type(error).__name__}: {error}") from error
    if not loss[mask].isfinite().all():
        raise wrong_result("model.loss.surrogate", name, f"returned the losses {loss.tolist()}: they must be finite")
    if not loss.requires_grad:
        raise wrong_result("model.loss.surrogate", name, "returned losses that do not depend on the policy's logprobs")


def _check_result(name: str, result: object, inputs: SurrogateInputs) -> SurrogateResult:
    if not isinstance(result, tuple) or len(result) != 2:
        raise wrong_result(
            "model.loss.surrogate",
            name,
            f"returned a {type(result).__name__}: it must return a loss and a bool per token",
        )
    shape = inputs.loss_mask.shape
    loss = check_tensor("model.loss.surrogate", name, "losses", result[0], shape)
    bounded = check_tensor("model.loss.surrogate", name, "flags of bounded tokens", result[1], shape, is_bool=True)
    return loss, bounded
