"""What a resumed run takes from its checkpoint and what from the config, and what its learning rate will be."""

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from fuchsia_pl.callbacks.access import module_of
from fuchsia_pl.policy.optimization import Choice, Recipe, ResumeChoice

MAX_OUTLOOK_STEPS = 10_000


class Resume(Callback):
    """Decides between checkpoint and config where optimizer or schedule differ, and prints the learning rates to come.

    Args:
        optimizer: "checkpoint" continues with the checkpoint's settings, "config" with the config's, and with the checkpoint's
            momenta where the class is the same. None refuses a difference.
        scheduler: "checkpoint" continues the checkpoint's schedule, "config" the config's, where that would be at the step of
            the checkpoint. None refuses a difference.
    """

    def __init__(self, optimizer: Choice | None = None, scheduler: Choice | None = None) -> None:
        self.choice = ResumeChoice(optimizer, scheduler)
        self.console = Console(highlight=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hands the decision to the module, which is asked when a checkpoint is loaded."""
        module_of(trainer).resume_choice = self.choice

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints where the schedule of a resumed run is; one that has ended may not be what was meant."""
        module = module_of(trainer)
        if module.loaded_step:
            line = outlook(trainer, module.recipe)  # on every rank, so that all end where it cannot be
            if line is not None and trainer.is_global_zero:
                self.console.print(line, soft_wrap=True, markup=False)


def outlook(trainer: Trainer, recipe: Recipe) -> str | None:
    """The learning rates from now to the end, in words; None where only a metric decides or none are left.

    Raises:
        ConfigError: The schedule ends before the run does.
    """
    num_steps = int(min(trainer.estimated_stepping_batches - trainer.global_step, MAX_OUTLOOK_STEPS))
    if not trainer.lr_scheduler_configs or num_steps < 1:
        return None
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    settings = {name: value for name, value in trainer.optimizers[0].param_groups[0].items() if name != "params"}
    rates = recipe.outlook(settings, scheduler.state_dict(), num_steps - 1)
    if rates is None:
        return None
    name = type(scheduler).__name__
    last = f"{'at least ' if num_steps == MAX_OUTLOOK_STEPS else ''}step {trainer.global_step + num_steps}"
    if len(set(rates)) == 1 and rates[0] != settings.get("initial_lr", rates[0]):
        return (
            f"resumed after step {trainer.global_step}: the schedule {name} has ended, and the learning rate stays at "
            f"{rates[0]:.3g} until {last}; it began at {settings['initial_lr']:.3g}. For another schedule change "
            "model.lr_scheduler and add --resume.scheduler config"
        )
    now = f"resumed after step {trainer.global_step}: the learning rate is {rates[0]:.3g} now"
    return f"{now} and {rates[-1]:.3g} in {last} ({name})"
