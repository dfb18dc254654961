"""A rehearsal of the longest rows before training, and the memory plan of the run."""

from dataclasses import replace

from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.callbacks.access import callbacks_of, data_of, module_of, policy_of
from fuchsia_pl.callbacks.hotswap import HotSwap, obstacle
from fuchsia_pl.policy.memory import KeptBytes, MemoryPlan, is_out_of_memory, memory_plan, possible_savings
from fuchsia_pl.progress import progress


class Preflight(Callback):
    """Runs the longest possible rows once before training, forward and backward, and counts the bytes that autograd saves.

    No later micro-batch needs more, so a run that does not fit fails before training. If memory runs out later (the moments of
    the optimizer, which the first step allocates and the plan contains; fragmentation; another program), the error names the
    three settings that would have saved most.

    Args:
        enabled: False skips the rehearsal. The memory plan then has no activations.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.plan: MemoryPlan | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rehearses before the first rollout is sampled."""
        data, policy, device = data_of(trainer), policy_of(trainer), trainer.strategy.root_device
        shares_device = any(swap.enabled for swap in callbacks_of(trainer, HotSwap))
        self.plan = replace(memory_plan(policy, data.engine, 0, device), shares_device=shares_device)
        if self.enabled:
            kept = KeptBytes(policy)
            try:
                with progress.activity("rehearsing the longest rows"), kept:
                    module_of(trainer).rehearse(data.longest_batch().to(device))
            finally:
                self.plan = replace(self.plan, activations=kept.num_bytes)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Adds the plan, and the settings that save most, to an out-of-memory error."""
        if self.plan is not None and is_out_of_memory(exception):
            can_share_device = not self.plan.shares_device and obstacle(trainer) is None
            device = trainer.strategy.root_device
            savings = self.plan.savings(possible_savings(policy_of(trainer), device, can_share_device))
            advice = "; ".join(f"{name} (about {size / 2**30:.1f} GB)" for name, size in savings)
            exception.add_note(f"Memory: {self.plan.text}. Settings that save most: {advice}")
