"""One optimizer step in a file: all that its losses and gradients are computed from, and what they were."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fuchsia_pl.batch import Batch, Denominators, PrefixGroup
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.checksums import check_intact
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.contents import fingerprint
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.policy.sharding import whole
from fuchsia_pl.types import ConfigError

# Of a batch, what is for logs alone and holds a user's objects.
LEFT_OUT = {"samples", "unused", "without_effect", "metrics", "skip_reason"}


class RecordedModule(Protocol):
    """What is recorded of the module."""

    policy: Policy
    policy_config: PolicyConfig
    loss_config: LossConfig
    behaviour: list[Tensor]


@dataclass(frozen=True)
class RecordedStep:
    """One rank's part of an optimizer step.

    Attributes:
        step: Optimizer steps before it.
        world_size: Number of ranks.
        precision: `trainer.precision`.
        settings: Policy and loss, as plain data.
        weights: The trained weights before the step, by name in the policy.
        batches: Its micro-batches, without samples.
        behaviour: The trainer's logprobs before the first update of the phase, of each micro-batch; float32 [B, T] each.
        losses: Of each micro-batch, as given to backward. Shape [number of micro-batches].
        gradient: Fingerprint of the gradients, of this rank's part.

    >>> RecordedStep(3, 1, "32-true", {}, {}, (), (), torch.zeros(0), ()).step
    3
    """

    step: int
    world_size: int
    precision: str
    settings: dict[str, Any]
    weights: dict[str, Tensor]
    batches: tuple[Batch, ...]
    behaviour: tuple[Tensor, ...]
    losses: Tensor
    gradient: tuple[int, ...]


def record_step(path: Path, trainer: Trainer, pl_module: LightningModule, batches: list[Batch], losses: Tensor) -> None:
    """Writes the step whose gradients the module holds. All ranks have to call it at the same time.

    Args:
        path: The file; with several ranks each writes one that ends in its rank.
        trainer: The run's, within `on_before_optimizer_step`.
        pl_module: The run's.
        batches: The step's micro-batches.
        losses: Of each of them, shape [number of micro-batches].
    """
    module = cast(RecordedModule, pl_module)
    trained = {name: p for name, p in module.policy.named_parameters() if p.requires_grad}
    content = {
        "step": trainer.global_step,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "settings": {"policy": asdict(module.policy_config), "loss": asdict(module.loss_config)},
        "weights": {name: whole(p.detach()).cpu() for name, p in trained.items()},
        "batches": [_plain(batch) for batch in batches],
        "behaviour": [logprobs.cpu() for logprobs in module.behaviour],
        "losses": losses.cpu(),
        "gradient": list(fingerprint([p.grad for p in trained.values() if p.grad is not None])),
    }
    target = path if trainer.world_size == 1 else path.with_name(f"{path.name}.rank{trainer.global_rank}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    torch.save(content, partial)
    partial.replace(target)


def _plain(batch: Batch) -> dict[str, Any]:
    on_host = batch.to("cpu")
    values = {f.name: getattr(on_host, f.name) for f in fields(on_host) if f.name not in LEFT_OUT}
    groups = [(group.num_rows, group.prefix_length) for group in batch.groups]
    return {**values, "groups": groups, "denominators": asdict(batch.denominators)}


def read_step(path: Path) -> RecordedStep:
    """A step that was recorded. No code in the file is run.

    Raises:
        ConfigError: It is no such file, or is damaged.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give a file that a run left under nonfinite/")
    check_intact(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        batches = tuple(_batch(values) for values in content.pop("batches"))
        behaviour, gradient = tuple(content.pop("behaviour")), tuple(content.pop("gradient"))
        return RecordedStep(**content, batches=batches, behaviour=behaviour, gradient=gradient)
    except Exception as error:  # a file of unknown origin: the unpickler fails in whatever way its bytes lead to
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
        raise ConfigError(f"{path} is no step that a run recorded ({reason}): give a file under nonfinite/") from error


def _batch(values: dict[str, Any]) -> Batch:
    groups = tuple(PrefixGroup(*group) for group in values["groups"])
    denominators = Denominators(**values["denominators"])
    return Batch(**{**values, "groups": groups, "denominators": denominators}, samples=(), metrics={})


def at_step_zero(recorded: RecordedStep) -> list[Batch]:
    """The micro-batches for a trainer whose first step this is."""
    return [replace(batch, policy_version=batch.policy_version - recorded.step) for batch in recorded.batches]
