"""A rehearsal of the longest rows before training, and the memory plan of the run."""

import logging
from dataclasses import replace

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoConfig

from fuchsia_pl.callbacks.access import callbacks_of, data_of, module_of, policy_of
from fuchsia_pl.callbacks.hotswap import HotSwap, moves_trained
from fuchsia_pl.callbacks.planned_run import RunParts, TrainerSettings
from fuchsia_pl.policy.memory import KeptBytes, device_memory, is_out_of_memory
from fuchsia_pl.policy.plan import GIB, MemoryPlan, PlannedRun, memory_plan
from fuchsia_pl.policy.plan_sizes import Activations, logits_bytes, weights_of
from fuchsia_pl.policy.planner import Planner
from fuchsia_pl.policy.sharding import local
from fuchsia_pl.progress import progress
from fuchsia_pl.rollouts.budget import LongestRow
from fuchsia_pl.rollouts.run_checks import UNPLANNED_SHARE
from fuchsia_pl.types import ConfigError

logger = logging.getLogger(__name__)
MIN_CHECKED_TOKENS = 8192  # fewer tokens in a micro-batch are not simulated in advance on a CPU


class Preflight(Callback):
    """Runs the longest possible rows once before training, forward and backward, and measures what they need.

    A run that does not fit fails before training. If memory runs out later (the moments of the optimizer, which the first step
    allocates and the plan contains; many short completions of one prompt, whose keys a GPU copies for each; fragmentation;
    another program), the error names the three settings that would have saved most.

    The plan is that of `fuchsia plan`. Before the engine starts, its trainer's side is simulated, so that an engine with
    `kv_cache_gb: auto` leaves that much of a GPU.

    Args:
        enabled: False skips the rehearsal. The memory plan then has no activations.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.plan: MemoryPlan | None = None

    def trainer_gb(self, trainer: Trainer, sleeps: bool) -> float:
        """Memory that the trainer needs at its peak; see `PlansMemory`. On a CPU it is 0, and the rehearsal is checked.

        Raises:
            ConfigError: The longest rows do not fit into the memory of the machine.
        """
        device, engine = trainer.strategy.root_device, data_of(trainer).engine
        if self.enabled and device.type == "cpu":
            check_machine(trainer)
        # An engine elsewhere and one with a number for its cache leave nothing by a plan.
        if device.type != "cuda" or engine.weights_share == 0.0 or engine.kv_cache_bytes > 0:
            return 0.0
        parts = run_parts(trainer)
        planner = parts.planner(device_memory(device), parts.module.policy_config.shared_prefix != "never")
        try:
            own = [part for part in planner.plan(parts.run()).parts if part.side == "trainer"]
            taken = [part for part in own if part.name != "CUDA context" and (part.stays or not sleeps)]
            return sum(part.num_bytes for part in taken) / GIB
        except ConfigError as error:
            if sleeps and moves_trained(trainer):
                return 0.0
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
                # Gradients of an adapter are whole until the end of a step, those of all weights sharded.
                trained = policy.trainable_parameters()
                gradients = sum((p if policy.config.lora.enabled else local(p)).nbytes for p in trained)
                measured = Activations(logits=logits, transients=max(peak - kept.num_bytes - logits - gradients, 0))
            finally:
                self.plan = memory_plan(run, weights, replace(measured, kept=kept.num_bytes), available)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Adds the plan, and the settings that save most, to an out-of-memory error."""
        if self.plan is not None and is_out_of_memory(exception):
            note = f"Memory: {self.plan.text}"
            try:
                planner = run_parts(trainer).planner(self.plan.available, policy_of(trainer).shares_prefix)
                note += f". Settings that save most: {saving_words(planner, started_run(trainer))}"
            except Exception as error:  # it must not replace the error that ended the run
                note += f". Settings that save most were not found: {type(error).__name__}: {error}"
            exception.add_note(note)


def check_machine(trainer: Trainer) -> None:
    """Refuses rows on a CPU that need more memory than the machine has: instead of an error, the system would kill the run.

    Raises:
        ConfigError: They do not fit.
    """
    parts, available = run_parts(trainer), device_memory(trainer.strategy.root_device)
    run = parts.run()
    num_tokens = run.num_rows * run.longest_row // run.num_micro_batches
    if min(num_tokens, run.policy.max_tokens_per_micro_batch or num_tokens) < MIN_CHECKED_TOKENS:
        return
    planner = parts.planner(available, run.policy.shared_prefix != "never")
    try:
        plan = planner.plan(run)
    except ConfigError:  # a model that cannot be simulated: the rehearsal measures it
        return
    if not plan.fits:
        raise ConfigError(
            f"the longest rows of a micro-batch do not fit into the memory of this machine: {plan.text}. Settings that save "
            f"most: {saving_words(planner, run)}"
        )


def saving_words(planner: Planner, run: PlannedRun) -> str:
    """The settings that save most, with what they save."""
    return "; ".join(f"{name} (about {size / GIB:.1f} GB)" for name, size in planner.savings(run))


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
