"""A rehearsal of the longest rows before training, and the memory plan of the run."""

import logging
from dataclasses import replace

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoConfig

from fuchsia_pl.callbacks.access import callbacks_of, data_of, module_of, policy_of
from fuchsia_pl.callbacks.hotswap import HotSwap
from fuchsia_pl.callbacks.planned_run import RunParts, TrainerSettings
from fuchsia_pl.policy.memory import KeptBytes, device_memory, is_out_of_memory
from fuchsia_pl.policy.plan import GIB, MemoryPlan, PlannedRun, memory_plan
from fuchsia_pl.policy.plan_sizes import Activations, logits_bytes, weights_of
from fuchsia_pl.progress import progress
from fuchsia_pl.rollouts.budget import LongestRow
from fuchsia_pl.types import ConfigError

logger = logging.getLogger(__name__)

# Share of a GPU that the trainer gets beside an engine that takes what is left, where its memory cannot be planned.
UNPLANNED_SHARE = 0.5


class Preflight(Callback):
    """Runs the longest possible rows once before training, forward and backward, and measures what they need.

    No later micro-batch needs more, so a run that does not fit fails before training. If memory runs out later (the moments of
    the optimizer, which the first step allocates and the plan contains; fragmentation; another program), the error names the
    three settings that would have saved most.

    The plan is that of `fuchsia plan`. Before the engine starts, its trainer's side is simulated, so that an engine with
    `kv_cache_gb: auto` leaves that much of a GPU.

    Args:
        enabled: False skips the rehearsal. The memory plan then has no activations.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.plan: MemoryPlan | None = None

    def trainer_gb(self, trainer: Trainer) -> float:
        """Memory that the trainer needs at its peak; see `PlansMemory`."""
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return 0.0
        parts = run_parts(trainer)
        planner = parts.planner(device_memory(device), parts.module.policy_config.shared_prefix != "never")
        try:
            return planner.plan(parts.run()).side("trainer") / GIB
        except ConfigError as error:
            reserved = UNPLANNED_SHARE * device_memory(device) / GIB
            logger.warning("%s. An engine with kv_cache_gb: auto leaves %.0f GiB for it", error, reserved)
            return reserved

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rehearses before the first rollout is sampled."""
        run, policy, device = started_run(trainer), policy_of(trainer), trainer.strategy.root_device
        weights, available = weights_of(policy), device_memory(device)
        self.plan = memory_plan(run, weights, Activations(), available)
        if self.enabled:
            kept, measured = KeptBytes(policy), Activations()
            batch = data_of(trainer).longest_batch().to(device)
            try:
                with progress.activity("rehearsing the longest rows"), kept:
                    before = start_of_peak(device)
                    module_of(trainer).rehearse(batch)
                    peak = peak_since(device, before)
                logits = logits_bytes(policy, int(batch.loss_mask.sum()))
                gradients = sum(parameter.nbytes for parameter in policy.trainable_parameters())
                measured = Activations(logits=logits, transients=max(peak - kept.num_bytes - logits - gradients, 0))
            finally:
                self.plan = memory_plan(run, weights, replace(measured, kept=kept.num_bytes), available)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Adds the plan, and the settings that save most, to an out-of-memory error."""
        if self.plan is not None and is_out_of_memory(exception):
            planner = run_parts(trainer).planner(self.plan.available, policy_of(trainer).shares_prefix)
            advice = "; ".join(
                f"{name} (about {size / GIB:.1f} GB)" for name, size in planner.savings(started_run(trainer))
            )
            exception.add_note(f"Memory: {self.plan.text}. Settings that save most: {advice}")


def run_parts(trainer: Trainer) -> RunParts:
    """What the plan of a run depends on."""
    module, data = module_of(trainer), data_of(trainer)
    settings = TrainerSettings(
        str(trainer.precision),
        trainer.accumulate_grad_batches,
        trainer.world_size,
        isinstance(trainer.strategy, ModelParallelStrategy),
        any(swap.enabled for swap in callbacks_of(trainer, HotSwap)),
        trainer.strategy.root_device.type == "cuda",
    )
    architecture = AutoConfig.from_pretrained(module.learner.served_model.folder)
    return RunParts(module, data, architecture, data.longest_row or LongestRow(1, 1), settings)


def started_run(trainer: Trainer) -> PlannedRun:
    """The run to plan, with the memory for keys and values that the engine has taken."""
    run = run_parts(trainer).run()
    if run.engine is None:
        return run
    return replace(run, engine=replace(run.engine, kv_cache=data_of(trainer).engine.kv_cache_bytes))


def start_of_peak(device: torch.device) -> int:
    """Bytes that torch has allocated on a GPU, from which the next peak counts; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_since(device: torch.device, before: int) -> int:
    """Highest number of bytes that torch has allocated on a GPU since, beyond those before; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
