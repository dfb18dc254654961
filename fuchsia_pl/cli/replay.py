"""`fuchsia replay FILE`: computes losses and gradients of a recorded step again, without an engine.

A run leaves such a file under `nonfinite/` where the loss or the gradient of a step was not finite.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from fuchsia_pl.callbacks.recorded_step import RecordedStep, at_step_zero, read_step
from fuchsia_pl.module import GRPOModule, parsed_settings
from fuchsia_pl.policy.contents import fingerprint, not_finite
from fuchsia_pl.types import ConfigError


@dataclass(frozen=True)
class Replayed:
    """What came of a recorded step.

    Attributes:
        losses: Of each micro-batch. Shape [number of micro-batches].
        gradients: By name of the weight, before clipping.
        same_losses: Whether the losses are the recorded ones, bit for bit.
        same_gradients: Likewise; None where several ranks averaged theirs, of which a file has one.

    >>> Replayed(torch.zeros(1), {}, True, None).same_losses
    True
    """

    losses: Tensor
    gradients: dict[str, Tensor]
    same_losses: bool
    same_gradients: bool | None


class _Capture(Callback):
    """Keeps losses and gradients of the one step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.losses.append(loss.detach().cpu())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        named = pl_module.policy.named_parameters()  # type: ignore[union-attr]
        self.gradients = {name: p.grad.clone() for name, p in named if p.requires_grad and p.grad is not None}


def replay_step(recorded: RecordedStep, root: Path) -> Replayed:
    """Trains a recorded step from its weights with a learning rate of 0.

    Args:
        recorded: What `read_step` returned.
        root: A folder for what Lightning may write.

    Raises:
        ConfigError: The model is not there, or not the one that was trained.
    """
    settings = parsed_settings(recorded.settings)
    module = GRPOModule(settings["policy"], settings["loss"], partial(torch.optim.SGD, lr=0.0))
    module.configure_model()
    assert module.policy is not None
    trained = {name for name, p in module.policy.named_parameters() if p.requires_grad}
    if trained != recorded.weights.keys():
        raise ConfigError(
            f"the file holds {len(recorded.weights)} trained weights, and the model has {len(trained)} others"
        )
    module.policy.load_state_dict(recorded.weights, strict=False)
    capture = _Capture()
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision=recorded.precision,  # type: ignore[arg-type]  # as the run's trainer had it
        default_root_dir=root,
        callbacks=[capture],
        accumulate_grad_batches=len(recorded.batches),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.behaviour = [logprobs.to(trainer.strategy.root_device) for logprobs in recorded.behaviour]
    trainer.fit(module, DataLoader(at_step_zero(recorded), batch_size=None))  # type: ignore[arg-type]  # any sequence
    losses = torch.stack(capture.losses)
    # A rank's loss is multiplied by the number of ranks, over which gradients are averaged.
    same_losses = torch.equal(_bits(losses), _bits(recorded.losses / recorded.world_size))
    found = fingerprint(list(capture.gradients.values()))
    same_gradients = found == recorded.gradient if recorded.world_size == 1 else None
    return Replayed(losses, capture.gradients, same_losses, same_gradients)


def _bits(losses: Tensor) -> Tensor:
    """A NaN is no other NaN's equal, but its bits are."""
    return losses.float().view(torch.int32)


def replay(arguments: list[str]) -> int:
    """Runs `fuchsia replay`; returns the exit code, 0 where the step was reproduced bit for bit."""
    parser = argparse.ArgumentParser(prog="fuchsia replay", description=__doc__)
    parser.add_argument("file", type=Path, help="what a run recorded, such as runs/NAME/0/nonfinite/step-7.pt")
    file = parser.parse_args(arguments).file
    try:
        recorded = read_step(file)
        replayed = replay_step(recorded, file.parent)
    except ConfigError as error:
        parser.error(str(error))
    report(Console(highlight=False), recorded, replayed)
    return 0 if replayed.same_losses and replayed.same_gradients is not False else 1


def report(console: Console, recorded: RecordedStep, replayed: Replayed) -> None:
    """Prints the losses beside the recorded ones, and which gradients are not finite."""
    for number, (before, now) in enumerate(zip(recorded.losses / recorded.world_size, replayed.losses, strict=True)):
        console.print(f"micro-batch {number}: loss {float(now):g}, recorded {float(before):g}")
    endless = not_finite(replayed.gradients)
    shown = f": {', '.join(endless[:3])}" if endless else ""
    console.print(f"{len(endless)} of {len(replayed.gradients)} gradients are not finite{shown}", soft_wrap=True)
    words = {True: "the same bit for bit", False: "others", None: "not compared (several ranks averaged theirs)"}
    console.print(
        f"step {recorded.step + 1}: losses are {words[replayed.same_losses]}, gradients are {words[replayed.same_gradients]}",
        soft_wrap=True,
    )
