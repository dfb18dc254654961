"""Console output of a run: its settings, a line per optimizer step, and sampled completions."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.access import callbacks_of, data_of, module_of, policy_of
from fuchsia_pl.callbacks.preflight import Preflight
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.memory import MemoryPlan
from fuchsia_pl.types import ConfigError, Rollout, Sample

# Label and format of the metrics in the line of a step, in order.
SHOWN = {
    "reward/mean": ("reward", ".3f"),
    "rollout/accuracy": ("accuracy", ".3f"),
    "train/kl": ("kl", ".4f"),
    "rollout/completion_tokens": ("length", ".1f"),
    "train/logprob_gap": ("gap", ".3f"),
    "perf/rollout_tokens_per_s": ("sampled tok/s", ".0f"),
    "perf/train_tokens_per_s": ("trained tok/s", ".0f"),
    "perf/step_seconds": ("s/step", ".1f"),
}


class ConsoleReport(ProgressBar):
    """Prints the settings of a run, then a line per optimizer step above a progress bar, and a completion every few steps.

    Args:
        every_n_steps: Optimizer steps between two shown completions; 0 shows none.

    Raises:
        ConfigError: `every_n_steps` is below 0.
    """

    def __init__(self, every_n_steps: int = 5) -> None:
        super().__init__()
        if every_n_steps < 0:
            raise ConfigError(f"console.every_n_steps must be 0 or more, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.console = Console(highlight=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._last_step = 0
        self._samples: list[Sample] = []

    def disable(self) -> None:
        """Turns the output off. Lightning calls this on all ranks but the first."""
        self.console.quiet = True

    def announce(self, model: str, engine: str, run_folder: str) -> None:
        """Prints the engine, model and run folder before the engine starts, which may take minutes."""
        self.console.print(f"{run_folder}: starting {engine} with {model} …", soft_wrap=True, markup=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table of settings and, on a terminal, starts the progress bar."""
        self._last_step = trainer.global_step
        self.console.print(run_table(trainer))
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
        )
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._task = self._progress.add_task("", total=total, completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Prints a line if this micro-batch completed an optimizer step."""
        self._samples += batch.samples
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._samples += batch.step.zero_advantage
        if trainer.global_step == self._last_step:
            return
        self._last_step = step = trainer.global_step
        line = step_line({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.console.print(f"step {step:>4}  {line}", soft_wrap=True)
        if self.every_n_steps and step % self.every_n_steps == 0 and self._samples:
            self.console.print(completion_panel(self._samples[step % len(self._samples)]))
        self._samples = []
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the held-out metrics before training."""
        number = trainer.num_sanity_val_steps
        self._print_evaluation(
            trainer, "before training" if number == float("inf") else f"before training, first {number} items"
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the held-out metrics."""
        if not trainer.sanity_checking:
            step = data_of(trainer).engine.policy_version
            self._print_evaluation(trainer, f"after step {step}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the held-out metrics."""
        self._print_evaluation(trainer, "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the progress bar and prints the run folder."""
        self._stop()
        self.console.print(f"done: {trainer.default_root_dir}", soft_wrap=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stops the progress bar, which controls the terminal."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print_evaluation(self, trainer: Trainer, when: str) -> None:
        held_out = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("validation/", "test/"))
        }
        figures = "  ".join(f"{name} {value:.3f}" for name, value in sorted(held_out.items()))
        self.console.print(f"held out, {when}: {figures}", soft_wrap=True)


def run_table(trainer: Trainer) -> Table:
    """Settings of a run as a table."""
    data, policy = data_of(trainer), policy_of(trainer)
    trained = sum(parameter.numel() for parameter in policy.trainable_parameters())
    total = sum(parameter.numel() for parameter in policy.parameters())
    adapter = f"LoRA r={data.served_model.lora_rank}" if data.served_model.lora_rank else "all weights"
    table = Table(show_header=False, box=None)
    split = f"{trainer.accumulate_grad_batches} micro-batches on {trainer.world_size} rank(s)"
    for name, value in {
        "model": data.served_model.name,
        "trained": f"{trained:,} of {total:,} parameters ({adapter})",
        "objective": objective_text(module_of(trainer).loss_config),
        "rows per step": f"{data.rows_per_step} in {split}",
        "prompts": "computed once for all siblings" if policy.shares_prefix else "computed in each row",
        "engine": type(data.engine).__name__,
        "memory": "; ".join(plan.text for plan in memory_plans(trainer)) or "no plan: the trainer has no Preflight",
        "run folder": trainer.default_root_dir,
    }.items():
        table.add_row(name, value)
    return table


def memory_plans(trainer: Trainer) -> list[MemoryPlan]:
    """The memory plans of the preflight callbacks that have run."""
    return [preflight.plan for preflight in callbacks_of(trainer, Preflight) if preflight.plan is not None]


def objective_text(config: LossConfig) -> str:
    """The algorithm and its settings, without the settings of parts that it does not use.

    >>> objective_text(LossConfig("rloo"))[:70]
    'rloo: advantage leave_one_out, surrogate reinforce, reduction constant'
    """
    settings, parts, uses = config.resolved(), config.parts, config.surrogate_spec.uses
    name, correction, critic, sapo = (
        settings.pop(key) for key in ("loss_type", "sampler_correction", "critic", "sapo")
    )
    idle = {
        "kl_": config.beta == 0.0,
        "old_logprobs": "old_logprobs" not in uses,
        "overlong_": parts.truncated != "penalise",
    }
    for prefix in (prefix for prefix, is_idle in idle.items() if is_idle):
        settings = {key: value for key, value in settings.items() if not key.startswith(prefix)}
    shown = [f"{key} {value}" for key, value in settings.items() if value is not None]
    bounds = f"{correction['level']} [{correction['low']:g}, {correction['high']:g}]"
    shown.append(
        f"sampler_correction {correction['mode']}" + (f" {bounds}" if correction["mode"] != "disabled" else "")
    )
    if "sapo" in uses:
        shown += [f"sapo.{key} {value}" for key, value in sapo.items()]
    if parts.advantage == "gae":
        shown += [f"critic.{key} {value}" for key, value in critic.items()]
    return f"{name}: {', '.join(shown)}"


def step_line(metrics: dict[str, float]) -> str:
    """The metrics in the line of a step, in order. Metrics that were not logged are left out.

    >>> step_line({"train/kl": 0.01234, "reward/mean": 0.5})
    'reward 0.500  kl 0.0123'
    """
    shown = ((label, form, metrics[name]) for name, (label, form) in SHOWN.items() if name in metrics)
    return "  ".join(f"{label} {value:{form}}" for label, form, value in shown)


def completion_panel(sample: Sample) -> Panel:
    """A completion with its rewards."""
    rollout = sample.rollout
    rewards = ", ".join(
        f"{name} {'none' if value is None else f'{value:g}'}" for name, value in rollout.rewards.items()
    )
    title = f"item {rollout.item_index}, sibling {rollout.sibling}: {rewards}, advantage {sample.mean_advantage:+.2f}"
    # Text, not markup: a completion must not be interpreted as formatting.
    return Panel(Text(f"{rollout.prompt}{conversation_text(rollout)}"), title=Text(title))


def conversation_text(rollout: Rollout) -> str:
    """The conversation after the prompt. Each response of the environment is on a separate line.

    >>> conversation_text(Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="2 plus 2?"))
    ''
    """
    said: list[str] = []
    num_turns = len(rollout.turns)
    for message in reversed(rollout.messages):
        if num_turns == 0:
            break
        is_turn = message["role"] == "assistant"
        num_turns -= is_turn
        said.insert(0, message["content"] if is_turn else f"\n[{message['role']}] {message['content']}\n")
    return "".join(said)
