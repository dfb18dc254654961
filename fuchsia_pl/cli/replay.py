"""`fuchsia replay FILE`: computes losses and gradients of a recorded step again.

A run records the steps that it skips because a loss or a gradient is not finite, and those of finite_guard.record_steps. The
file contains the trained weights and the tokens. The model is found by its name. Engine, environment and data are not needed.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils.logging import disable_progress_bar

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.recorded_step import RecordedStep, read_step, unscaled
from fuchsia_pl.cli.failures import one_line
from fuchsia_pl.cli.options import replay_options
from fuchsia_pl.module import GRPOModule, parsed_settings
from fuchsia_pl.policy.contents import fingerprint, not_finite
from fuchsia_pl.policy.sharding import total_norm
from fuchsia_pl.policy.tensor_files import first_difference
from fuchsia_pl.types import ConfigError

NUM_SHOWN = 3


@dataclass(frozen=True)
class Replayed:
    """Losses and gradients of a recorded step, computed again.

    Attributes:
        device: Type of the device, such as "cpu".
        losses: Loss of each micro-batch, as given to backward. Shape [number of micro-batches].
        gradients: Gradients by name of the weight, before clipping; of the rows of one rank if the run had several.
        endless: For each micro-batch, the names of the tensors that are not finite under its loss mask.
        endless_metrics: Names of the step's metrics that are not finite, the parts of the loss among them.
        same_losses: Whether the losses equal the recorded ones, bit for bit.
        same_gradients: Likewise; None if the run had several ranks: the file has the rows of one.

    >>> Replayed("cpu", torch.zeros(1), {}, ((),), (), True, None).same_losses
    True
    """

    device: str
    losses: Tensor
    gradients: dict[str, Tensor]
    endless: tuple[tuple[str, ...], ...]
    endless_metrics: tuple[str, ...]
    same_losses: bool
    same_gradients: bool | None


class _ReplayModule(GRPOModule):
    """Scales losses as in a run of several ranks."""

    recorded_ranks = 1

    def configure_callbacks(self) -> list[Callback]:
        return []  # no engine to sync, no rollouts to log

    @property
    def num_ranks(self) -> int:
        return self.recorded_ranks


class _Capture(Callback):
    """Keeps losses, gradients and names of tensors that are not finite."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}
        self.endless: list[tuple[str, ...]] = []
        self.endless_metrics: tuple[str, ...] = ()
        self._batch: Batch | None = None
        self._outputs: dict[str, Tensor | None] = {}

    def keep_outputs(self, policy: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor | None]) -> None:
        """A forward hook of the policy."""
        if torch.is_grad_enabled():
            names = ("the policy's logprobs", "the policy's entropies", "the critic's values")
            self._outputs = dict(zip(names, outputs, strict=True))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        assert isinstance(pl_module, GRPOModule)
        batch = self._batch
        assert batch is not None
        found = {
            **self._outputs,
            "logprobs before the first update": pl_module.trainer_logprobs[len(self.losses)],
            "the reference's logprobs": pl_module.ref_logprobs,
            "the sampler's logprobs": batch.sampling_logprobs,
            "advantages": batch.advantages,
            "the critic's values before the update": batch.old_values,
            "value targets": batch.value_targets,
        }
        masked = {name: tensor.detach()[batch.loss_mask] for name, tensor in found.items() if tensor is not None}
        self.endless.append(tuple(not_finite(masked)))
        self.losses.append(unscaled(trainer, loss.detach()).cpu())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert isinstance(pl_module, GRPOModule)
        assert pl_module.policy is not None
        self.endless_metrics = tuple(not_finite(pl_module.step_metrics))
        named = pl_module.policy.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.requires_grad and p.grad is not None}


def replay_step(recorded: RecordedStep, root: Path) -> Replayed:
    """Trains a recorded step from its weights with a learning rate of 0.

    Args:
        recorded: What `read_step` returned.
        root: A folder for files of Lightning.

    Raises:
        ConfigError: The model is missing, or is not the one that was trained.
    """
    module, capture = _module(recorded), _Capture()
    assert module.policy is not None
    hook = module.policy.register_forward_hook(capture.keep_outputs)
    trainer = Trainer(
        accelerator="cpu" if recorded.device == "cpu" else "auto",
        devices=1,
        precision=recorded.precision,  # type: ignore[arg-type]  # the precision of the run's trainer
        default_root_dir=root,
        callbacks=[capture],
        accumulate_grad_batches=len(recorded.batches),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.trainer_logprobs = [logprobs.to(trainer.strategy.root_device) for logprobs in recorded.trainer_logprobs]
    # This trainer counts its steps from 0, the run did not.
    info = recorded.batches[0].step
    info = replace(info, step=0, policy_version=info.policy_version - recorded.step)
    batches = [replace(batch, step=info) for batch in recorded.batches]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(recorded.num_threads)
    try:
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]  # any sequence
    finally:
        torch.set_num_threads(num_threads)
        hook.remove()
    losses, found = torch.stack(capture.losses), fingerprint(list(capture.gradients.values()))
    return Replayed(
        trainer.strategy.root_device.type,
        losses,
        capture.gradients,
        tuple(capture.endless),
        capture.endless_metrics,
        torch.equal(_bits(losses), _bits(recorded.losses)),
        found == recorded.gradient if recorded.world_size == 1 else None,
    )


def _module(recorded: RecordedStep) -> GRPOModule:
    """The module with the recorded weights."""
    try:
        # The prompts are recorded as tokens: the file of a template may not exist any more.
        policy = {**recorded.settings["policy"], "chat_template": None}
        settings = parsed_settings({**recorded.settings, "policy": policy})
    except Exception as error:  # jsonargparse raises several classes; the settings are those of another version
        raise ConfigError(f"the settings of the recorded step are not of this version: {one_line(error)}") from error
    module = _ReplayModule(settings["policy"], settings["loss"], partial(torch.optim.SGD, lr=0.0))
    module.recorded_ranks = recorded.world_size
    module.configure_model()
    assert module.policy is not None
    trained = {name: tuple(p.shape) for name, p in module.policy.named_parameters() if p.requires_grad}
    difference = first_difference({name: tuple(w.shape) for name, w in recorded.weights.items()}, trained)
    if difference:
        raise ConfigError(
            f"the model {settings['policy'].name} has other weights than the recorded step: {difference}. Put the model of "
            "that run in its place"
        )
    module.policy.load_state_dict(recorded.weights, strict=False)
    return module


def _bits(losses: Tensor) -> Tensor:
    """The bits of losses: a NaN is not equal to itself, but its bits are."""
    return losses.float().view(torch.int32)


def replay(arguments: list[str]) -> int:
    """Runs `fuchsia replay`; returns the exit code, 0 if the step was reproduced bit for bit."""
    file = replay_options().parse_args(arguments).file
    try:
        recorded = read_step(file)
        with _quiet():
            replayed = replay_step(recorded, file.parent)
    except ConfigError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        raise SystemExit(2) from error
    report(Console(highlight=False, soft_wrap=True), recorded, replayed)
    return 0 if replayed.same_losses and replayed.same_gradients is not False else 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the `with` block, libraries print no warnings about the settings and no progress bar."""
    disable_progress_bar()
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        lightning.setLevel(level)


def report(console: Console, recorded: RecordedStep, replayed: Replayed) -> None:
    """Prints losses and gradient beside the recorded ones, and names tensors that are not finite."""
    ranks = f", one of {recorded.world_size} ranks" if recorded.world_size > 1 else ""
    console.print(
        f"step {recorded.step + 1}, recorded on {recorded.device}{ranks}, computed on {replayed.device} in {recorded.precision}"
    )
    console.print(f"trained weights: {_listed(not_finite(recorded.weights), len(recorded.weights))}")
    each = zip(recorded.batches, recorded.losses, replayed.losses, replayed.endless, strict=True)
    number = 0
    for batch, before, now, endless in each:
        if not batch.has_rows:
            continue
        number += 1
        found = f"; not finite: {', '.join(endless)}" if endless else ""
        console.print(f"micro-batch {number}: loss {float(now):g}, recorded {float(before):g}{found}")
    if replayed.endless_metrics:
        console.print(f"metrics that are not finite: {', '.join(replayed.endless_metrics)}")
    norm = float(total_norm(list(replayed.gradients.values())))
    console.print(f"gradient norm: {norm:g}, recorded {recorded.gradient_norm:g}{' over all ranks' if ranks else ''}")
    console.print(f"gradients: {_listed(not_finite(replayed.gradients), len(replayed.gradients))}")
    words = {True: "the same bit for bit", False: "different", None: "not compared (the ranks averaged theirs)"}
    console.print(f"losses: {words[replayed.same_losses]}; gradients: {words[replayed.same_gradients]}")


def _listed(endless: list[str], num_all: int) -> str:
    more = f" and {len(endless) - NUM_SHOWN} more" if len(endless) > NUM_SHOWN else ""
    found = f" ({', '.join(endless[:NUM_SHOWN])}{more})" if endless else ""
    return f"{len(endless)} of {num_all} are not finite{found}"
