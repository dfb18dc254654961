"""`fuchsia check-env`: checks that an environment rewards the gold answer most and survives hostile texts.

Nothing is trained, and of the model only the tokenizer is loaded. First, the checks of the start of `fuchsia fit` run. Then
fixed texts replace the policy's output in the collector that training uses, so prompts, tools, reward functions and time limits
are those of training. The rewards of an environment's tasks are audited in processes with limits.
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import ArgsType
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fuchsia_pl.cli.audit_table import report_audit, run_audit
from fuchsia_pl.cli.config_only import ConfigOnlyCLI
from fuchsia_pl.cli.examination import Examination, Examiner, Run
from fuchsia_pl.cli.options import check_env_options
from fuchsia_pl.cli.played import Played
from fuchsia_pl.datamodule import CLOSE_TIMEOUT_S
from fuchsia_pl.envs.audit.environment_task import environment_task
from fuchsia_pl.envs.audit.player import AuditSettings
from fuchsia_pl.envs.audit.task import AuditTask
from fuchsia_pl.envs.base import check_rewards
from fuchsia_pl.envs.user_code import user_code
from fuchsia_pl.loop import run_blocking
from fuchsia_pl.rollouts.calls import close
from fuchsia_pl.rollouts.preparation import as_config_error


class CheckEnvCLI(ConfigOnlyCLI):
    """Uses the environment, the tokenizer, the lengths and the number of items of a config."""

    def __init__(self, args: ArgsType, num_items: int, all_tasks: bool) -> None:
        self.num_items = num_items
        self.all_tasks = all_tasks
        self.holds = False
        super().__init__(args)

    def use_config(self) -> None:
        """Examines the environment and prints the results, or audits all its tasks; then audits the configured tasks."""
        environment, console = self.datamodule.environment, Console(highlight=False)
        check_rewards(environment)
        self.holds = self.all_tasks or self._examined(console)
        try:
            tasks = self._tasks()
            if tasks:
                audited = run_audit(console, tasks, AuditSettings(num_items=self.num_items))
                report_audit(console, audited)
                self.holds &= not any(one.findings for one in audited)
        finally:
            if self.all_tasks:  # the examination has closed it otherwise
                run_blocking(close(environment, CLOSE_TIMEOUT_S))

    def _tasks(self) -> Sequence[AuditTask]:
        """The tasks to audit. With --all-tasks, an environment without tasks is one."""
        environment = self.datamodule.environment
        with as_config_error(f"{type(environment).__name__}.audit_tasks"), user_code():
            tasks = environment.audit_tasks(self.all_tasks)
        if tasks or not self.all_tasks:
            return tasks
        config = self._get(self.config, "data").environment
        arguments = config.init_args.as_dict() if "init_args" in config else {}
        return [environment_task(environment, config.class_path, arguments)]

    def _examined(self, console: Console) -> bool:
        """Examines the environment and prints the results. Returns whether there is no finding."""
        trainer = self._get(self.config, "trainer")
        limit = trainer.limit_val_batches
        ranks, budget = (
            num_ranks(trainer.devices, trainer.num_nodes),
            self.model.policy_config.max_tokens_per_micro_batch,
        )
        run = Run(ranks, budget, held_out=1.0 if limit is None else limit)
        found = run_blocking(Examiner(self.datamodule, run, self.num_items).examine())
        report(console, found)
        return not found.wrong


def num_ranks(devices: Any, num_nodes: int) -> int:
    """The number of ranks of a run; counts 1 for each node if `devices` depends on the machine.

    >>> num_ranks(4, 2), num_ranks([0, 1], 1), num_ranks("auto", 1), num_ranks("2", 1), num_ranks(-1, 1)
    (8, 2, 1, 2, 1)
    """
    if isinstance(devices, list):
        return len(devices) * num_nodes
    return (int(devices) if str(devices).isdecimal() else 1) * num_nodes


def report(console: Console, found: Examination) -> None:
    """Prints a prompt, a table with a row for each text, and the faults."""
    environment, played = found.environment, found.played
    shown = next((one.rollouts[0] for one in played if one.rollouts), None)
    if shown is not None:
        console.print(Panel(Text(shown.prompt.rstrip()), title=f"prompt of item {shown.item_index}"))
    console.print(_table(played))
    for line in [_counted(found), *(f"not checked: {sentence}" for sentence in found.unchecked)]:
        console.print(Text(line), soft_wrap=True)
    for sentence in found.wrong:
        console.print(Text(f"does not hold: {sentence}"), soft_wrap=True)
    number = len(found.wrong)
    outcome = f"{number} finding{'s' if number > 1 else ''}" if number else "holds"
    console.print(f"{type(environment).__name__}: {outcome}")


def _table(played: Sequence[Played]) -> Table:
    """A row for each text: its rewards over all items and siblings, and the statuses of its rollouts."""
    by_name = {name: [one for one in played if one.name == name] for name in dict.fromkeys(p.name for p in played)}
    rewards = list(dict.fromkeys(name for one in played for rollout in one.rollouts for name in rollout.rewards))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("text", no_wrap=True)
    table.add_column("total", justify="right")
    for name in rewards:
        table.add_column(name, justify="right")
    table.add_column("status")
    table.add_column("s", justify="right", no_wrap=True)
    for name, group in by_name.items():
        table.add_row(*(Text(cell) for cell in _row(name, group, rewards)))
    return table


def _row(name: str, group: Sequence[Played], rewards: Sequence[str]) -> list[str]:
    rollouts = [rollout for one in group for rollout in one.rollouts]
    ends = sorted({str(r.status) for r in rollouts} | {"error" for one in group if one.error is not None})
    counts = sorted({count for r in rollouts for count, number in r.counts.items() if number})
    return [
        name,
        _range([r.reward for r in rollouts]),
        *(_range([r.rewards.get(reward) for r in rollouts]) for reward in rewards),
        ", ".join([*ends, *counts]),
        f"{max(one.seconds for one in group):.1f}",
    ]


def _range(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "none"
    low, high = f"{min(numbers):g}", f"{max(numbers):g}"
    return low if low == high else f"{low} to {high}"


def _counted(found: Examination) -> str:
    too_long = f" ({found.num_too_long} more left out as too long)" if found.num_too_long else ""
    held_out = "" if found.num_held_out is None else f", {found.num_held_out} held-out items"
    places = len({one.place for one in found.played})
    siblings = max(len(one.rollouts) for one in found.played)
    return f"{found.num_items} training items{too_long}{held_out}; played on {places} of them, in groups of {siblings}"


def check_env(arguments: list[str]) -> int:
    """Runs `fuchsia check-env`; returns the exit code, 0 if there is no finding."""
    parser = check_env_options()
    given, rest = parser.parse_known_args(arguments)
    if given.num_items < 1:
        parser.error(f"--num-items must be 1 or more, got {given.num_items}")
    return 0 if CheckEnvCLI(["fit", *rest], given.num_items, given.all_tasks).holds else 1
