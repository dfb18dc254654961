"""A rehearsal of the longest rows before training, and the memory plan of the run."""

from dataclasses import replace

from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.callbacks.access import callbacks_of, data_of, module_of, policy_of
from fuchsia_pl.callbacks.hotswap import HotSwap, obstacle
from fuchsia_pl.policy.memory import KeptBytes, MemoryPlan, is_out_of_memory, memory_plan, possible_savings


class Preflight(Callback):
    """Runs the longest rows that can come once before training, forward and backward, and counts what is kept for it.

    No later batch then keeps more than what was met before anything was learned. Should memory still run out (the optimizer's
    moments, which come with the first step and are in the plan; fragments; another program), the error names the three
    settings that would have saved most.

    Args:
        enabled: Off leaves the longest rows to chance, and the memory plan without its activations.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.plan: MemoryPlan | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first rollout is sampled."""
        data, policy, device = data_of(trainer), policy_of(trainer), trainer.strategy.root_device
        shares_device = any(swap.enabled for swap in callbacks_of(trainer, HotSwap))
        self.plan = replace(memory_plan(policy, data.engine, 0, device), shares_device=shares_device)
        if self.enabled:
            kept = KeptBytes(policy)
            try:
                with kept:
                    module_of(trainer).rehearse(data.longest_batch().to(device))
            finally:
                self.plan = replace(self.plan, activations=kept.num_bytes)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Adds to an out-of-memory error what would have saved most."""
        if self.plan is not None and is_out_of_memory(exception):
            can_share_device = not self.plan.shares_device and obstacle(trainer) is None
            device = trainer.strategy.root_device
            savings = self.plan.savings(possible_savings(policy_of(trainer), device, can_share_device))
            advice = "; ".join(f"{name} (about {size / 2**30:.1f} GB)" for name, size in savings)
            exception.add_note(f"Memory: {self.plan.text}. What would save most: {advice}")
