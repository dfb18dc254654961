"""Choice between checkpoint and config for a resumed run, and its future learning rates."""

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from fuchsia_pl.callbacks.access import module_of
from fuchsia_pl.policy.optimization import Choice, Recipe, ResumeChoice

MAX_OUTLOOK_STEPS = 10_000


class Resume(Callback):
    """Chooses checkpoint or config if their optimizer or schedule differ, and prints the future learning rates.

    Args:
        optimizer: "checkpoint" uses the settings of the checkpoint, "config" those of the config, with the momenta of the
            checkpoint if the class is the same. None raises an error if they differ.
        scheduler: "checkpoint" continues the schedule of the checkpoint, "config" the schedule of the config from the step of
            the checkpoint. None raises an error if they differ.
    """

    def __init__(self, optimizer: Choice | None = None, scheduler: Choice | None = None) -> None:
        self.choice = ResumeChoice(optimizer, scheduler)
        self.console = Console(highlight=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Passes the choice to the module, which applies it when it loads a checkpoint."""
        module_of(trainer).resume_choice = self.choice

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the learning rates of a resumed run: a schedule that has ended may not be intended."""
        module = module_of(trainer)
        if module.loaded_step:
            line = outlook(trainer, module.recipe)  # on every rank, so that an error ends all of them
            if line is not None and trainer.is_global_zero:
                self.console.print(line, soft_wrap=True, markup=False)


def outlook(trainer: Trainer, recipe: Recipe) -> str | None:
    """A line with the learning rates until the end of the run. None if they depend on a metric, or no step is left.

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
