"""One optimizer step in a file: the inputs of its losses and gradients, and their values."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from fuchsia_pl.batch import Batch, Denominators, PrefixGroup, StepInfo
from fuchsia_pl.callbacks.access import module_of, policy_of
from fuchsia_pl.files import replacing
from fuchsia_pl.policy.checksums import check_intact
from fuchsia_pl.policy.contents import fingerprint
from fuchsia_pl.policy.sharding import whole
from fuchsia_pl.types import ConfigError

# Recorded fields of StepInfo. The others are for logs and contain a user's objects.
STEP_FIELDS = ("step", "policy_version", "max_staleness", "policy_update", "phase_step")
KINDS = {
    "step": int,
    "world_size": int,
    "precision": str,
    "num_threads": int,
    "settings": dict,
    "weights": dict,
    "losses": Tensor,
    "gradient_norm": float,
}


@dataclass(frozen=True)
class RecordedStep:
    """The part of an optimizer step that one rank computes.

    Attributes:
        step: Optimizer steps before it.
        world_size: Number of ranks.
        precision: `trainer.precision`.
        device: Type of the device, such as "cuda".
        num_threads: Threads of torch on a CPU. The order of its sums depends on them.
        settings: Policy and loss, as plain data.
        weights: The trained weights before the step, by name in the policy.
        batches: The micro-batches, without samples.
        trainer_logprobs: The trainer's logprobs before the first update of the phase, of each micro-batch; float32 [B, T] each.
        losses: Loss of each micro-batch, as given to backward. Shape [number of micro-batches].
        gradient: Fingerprint of this rank's part of the gradients.
        gradient_norm: L2 norm of the gradient over all ranks, before clipping.

    >>> RecordedStep(3, 1, "32-true", "cpu", 1, {}, {}, (), (), torch.zeros(0), (), 0.5).step
    3
    """

    step: int
    world_size: int
    precision: str
    device: str
    num_threads: int
    settings: dict[str, Any]
    weights: dict[str, Tensor]
    batches: tuple[Batch, ...]
    trainer_logprobs: tuple[Tensor, ...]
    losses: Tensor
    gradient: tuple[int, ...]
    gradient_norm: float


def record_step(path: Path, trainer: Trainer, batches: list[Batch], losses: Tensor, norm: Tensor) -> Path:
    """Writes the step whose gradients the module has. All ranks must call it at the same time.

    Args:
        path: The file. With several ranks, the file of each ends in its rank, and that of the first contains the weights.
        trainer: The trainer, within `on_before_optimizer_step`.
        batches: The step's micro-batches.
        losses: Loss of each micro-batch, shape [number of micro-batches].
        norm: L2 norm of the gradient, a scalar.

    Returns:
        The file of this rank.

    Raises:
        DiskError: The file could not be written. All exchanges between ranks are complete by then.
    """
    module = module_of(trainer)
    trained = {name: p for name, p in policy_of(trainer).named_parameters() if p.requires_grad}
    weights = {name: _kept(whole(p.detach()), trainer.is_global_zero) for name, p in trained.items()}
    content = {
        "step": trainer.global_step,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "device": trainer.strategy.root_device.type,
        "num_threads": torch.get_num_threads(),
        "settings": {"policy": asdict(module.policy_config), "loss": asdict(module.loss_config)},
        "weights": weights if trainer.is_global_zero else None,
        "info": _plain_info(batches[0].step),
        "batches": [_plain_batch(batch) for batch in batches],
        "trainer_logprobs": [logprobs.cpu() for logprobs in module.trainer_logprobs],
        "losses": losses.cpu(),
        "gradient": list(fingerprint([p.grad for p in trained.values() if p.grad is not None])),
        "gradient_norm": float(norm),
    }
    target = path if trainer.world_size == 1 else path.with_name(f"{path.name}.rank{trainer.global_rank}")
    with replacing(target) as partial, partial.open("wb") as stream:
        torch.save(content, stream)
    return target


def scaler_of(trainer: Trainer) -> "torch.amp.GradScaler | None":
    """The gradient scaler of a run in half precision, None in other precisions."""
    precision = trainer.precision_plugin
    return precision.scaler if isinstance(precision, MixedPrecision) else None


def unscaled(trainer: Trainer, loss: Tensor) -> Tensor:
    """The loss that the module returned. Lightning scales it before it calls `on_before_backward`."""
    scaler = scaler_of(trainer)
    return loss if scaler is None else loss / scaler.get_scale()


def _kept(weight: Tensor, is_writer: bool) -> Tensor:
    """A weight on the host of the writing rank; an empty tensor on other ranks."""
    return weight.cpu() if is_writer else weight.new_empty(0)


def _plain_info(info: StepInfo) -> dict[str, Any]:
    return {**{name: getattr(info, name) for name in STEP_FIELDS}, "denominators": asdict(info.denominators)}


def _plain_batch(batch: Batch) -> dict[str, Any]:
    on_host = batch.to("cpu")
    values = {f.name: getattr(on_host, f.name) for f in fields(on_host) if f.name not in ("samples", "step")}
    return {**values, "groups": [(group.num_rows, group.prefix_length) for group in batch.groups]}


def read_step(path: Path) -> RecordedStep:
    """Reads a recorded step. It executes no code of the file.

    Raises:
        ConfigError: The file is not a recorded step, or is damaged.
    """
    content = _read(path)
    if content.get("weights") is None:
        content["weights"] = _read(path.with_suffix(".rank0")).get("weights")
    try:
        info = _info(content.pop("info"))
        batches = tuple(_batch(values, info) for values in content.pop("batches"))
        trainer_logprobs, gradient = tuple(content.pop("trainer_logprobs")), tuple(content.pop("gradient"))
        recorded = RecordedStep(**content, batches=batches, trainer_logprobs=trainer_logprobs, gradient=gradient)
    except Exception as error:  # a file of unknown origin may contain anything
        raise _foreign(path, error) from error
    for name, kind in KINDS.items():
        if not isinstance(getattr(recorded, name), kind):
            raise _foreign(path, TypeError(f"its {name} is a {type(getattr(recorded, name)).__name__}"))
    return recorded


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist or is no file: give a file that a run wrote to its recorded/")
    check_intact(path, "recorded step")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types for damaged bytes
        raise _foreign(path, error) from error
    if not isinstance(content, dict):
        raise _foreign(path, TypeError(f"it contains a {type(content).__name__}"))
    return content


def _foreign(path: Path, error: Exception) -> ConfigError:
    reason = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
    return ConfigError(
        f"{path} is no step that this version has recorded ({reason}): give a file that a run wrote to its recorded/"
    )


def _info(values: dict[str, Any]) -> StepInfo:
    # Files without phase_step are of a version without mini-batches.
    known = {"phase_step": values["policy_update"], **values}
    return StepInfo(**{**known, "denominators": Denominators(**values["denominators"])})


def _batch(values: dict[str, Any], info: StepInfo) -> Batch:
    groups = tuple(PrefixGroup(*group) for group in values["groups"])
    return Batch(**{**values, "groups": groups}, step=info, samples=())
