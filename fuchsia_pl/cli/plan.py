"""`fuchsia plan`: the memory of a config on a GPU, from config files alone."""

import difflib
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch.cli import ArgsType
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fuchsia_pl.callbacks.memory_table import memory_table, size
from fuchsia_pl.callbacks.planned_run import RunParts
from fuchsia_pl.cli.check_env import num_ranks
from fuchsia_pl.cli.config_only import ConfigOnlyCLI
from fuchsia_pl.cli.options import GPU_GIB, plan_options
from fuchsia_pl.cli.planned_config import planned_parts
from fuchsia_pl.engines.vllm_kv_cache import FREE_SHARE
from fuchsia_pl.policy.architectures import architecture_of
from fuchsia_pl.policy.plan import GIB, MemoryPlan, checkpoint_bytes, host_bytes, sync_bytes
from fuchsia_pl.rollouts.budget import plan_micro_batches
from fuchsia_pl.types import ConfigError


@dataclass(frozen=True)
class Planned:
    """What `fuchsia plan` found.

    Attributes:
        title: Model and devices.
        plan: The memory of a GPU.
        figures: Other sizes of the run, as texts by name.
        options: Sets of options with each of which it fits, the cheapest first; none if it fits.
    """

    title: str
    plan: MemoryPlan
    figures: dict[str, str]
    options: tuple[str, ...] = ()


class PlanCLI(ConfigOnlyCLI):
    """Plans the memory of a config."""

    def __init__(self, args: ArgsType, gpu_gib: float, gpus: int | None) -> None:
        self.gpu_gib, self.gpus = gpu_gib, gpus
        self.found: Planned | None = None
        super().__init__(args)

    def use_config(self) -> None:
        """Plans the run; if it does not fit, looks for settings with which it does."""
        trainer, policy = self._get(self.config, "trainer"), self.model.policy_config
        ranks = self.gpus or num_ranks(trainer.devices, trainer.num_nodes)
        parts = planned_parts(self, architecture_of(policy.name), ranks, is_gpu=True)
        shares_prefix = policy.shared_prefix != "never"
        planner = parts.planner(int((1 - FREE_SHARE) * self.gpu_gib * GIB), shares_prefix)
        run = parts.run()
        plan, (weights, activations) = planner.plan(run), planner.needs(run)
        figures = {
            "micro-batches of a step": micro_batches(parts, shares_prefix),
            "largest micro-batch": f"{planner.largest(run).num_tokens:,} tokens",
            "KV cache": cache_text(parts, plan),
            "host memory": size(host_bytes(run, weights, activations)),
            "checkpoint": f"{size(checkpoint_bytes(run, weights))}; a run has two while it writes one",
            "sync": f"{size(sync_bytes(run, weights))} to the engine, once per phase",
        }
        gpus = f"{ranks} GPU{'s' if ranks > 1 else ''} of {self.gpu_gib:g} GiB, of which {FREE_SHARE:.0%} stay free"
        title = f"{policy.name} on {gpus}"
        options = () if plan.fits else tuple(planner.options(run))
        self.found = Planned(title, plan, {name: text for name, text in figures.items() if text}, options)


def micro_batches(parts: RunParts, shares_prefix: bool) -> str:
    """Number of micro-batches of a step."""
    budget = parts.module.policy_config.max_tokens_per_micro_batch
    if budget is None:
        return str(parts.trainer.num_micro_batches)
    group_size, shares = parts.data.sampling.group_size, shares_prefix and parts.has_single_rows
    number = plan_micro_batches(parts.row, parts.num_groups, group_size, shares, budget)
    return f"at most {number} of {budget:,} tokens, as many as the rows fill"


def cache_text(parts: RunParts, plan: MemoryPlan) -> str:
    """Tokens and rows that the engine's cache holds; empty without one."""
    engine, num_bytes = parts.run().engine, plan.size("engine", "KV cache")
    if engine is None or not num_bytes or not engine.kv_per_token:
        return ""
    tokens = num_bytes // engine.kv_per_token
    rows = min(tokens // engine.max_length, engine.max_num_seqs)
    return f"{tokens:,} tokens: {rows} of {engine.max_num_seqs} rows (max_num_seqs) of {engine.max_length:,} tokens at a time"


def report(console: Console, found: Planned) -> None:
    """Prints the plan."""
    console.print(Text(found.title), soft_wrap=True)
    console.print(memory_table(found.plan))
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in found.figures.items():
        table.add_row(Text(name, style="dim"), Text(text))
    console.print(table)
    if found.options:
        console.print(Text("Each of these makes it fit, the cheapest first:"))
    elif not found.plan.fits:
        console.print(Text("No three settings make it fit: use a smaller model, more GPUs, or vLLM on servers"))
    for option in found.options:
        console.print(Text(f"  {option}"), soft_wrap=True)


def as_json(found: Planned) -> dict[str, Any]:
    """The plan as plain data; sizes in bytes."""
    return {**asdict(found), "peak": found.plan.total, "fits": found.plan.fits}


def gpu_memory(name: str) -> float:
    """Memory of a GPU in GiB, given as a number or as its name.

    Raises:
        ConfigError: It is neither.

    >>> gpu_memory("24"), gpu_memory("H100")
    (24.0, 79.1)
    """
    known = GPU_GIB.get(name.lower())
    if known is not None:
        return known
    try:
        number = float(name)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        similar = difflib.get_close_matches(name.lower(), GPU_GIB, n=1)
        hint = f". Did you mean {similar[0]}?" if similar else ""
        raise ConfigError(f"--gpu {name!r} is neither a number of GiB above 0 nor one of {', '.join(GPU_GIB)}{hint}")
    return number


def plan(arguments: list[str]) -> int:
    """Runs `fuchsia plan`; returns the exit code, 1 if the run does not fit."""
    parser = plan_options()
    given, rest = parser.parse_known_args(arguments)
    try:
        gpu_gib = gpu_memory(given.gpu)
    except ConfigError as error:
        parser.error(str(error))
    if given.gpus is not None and given.gpus < 1:
        parser.error(f"--gpus must be 1 or more, got {given.gpus}")
    found = PlanCLI(["fit", *rest], gpu_gib, given.gpus).found
    assert found is not None, "use_config has run"
    if given.json:
        sys.stdout.write(json.dumps(as_json(found), indent=1) + "\n")
    else:
        report(Console(highlight=False), found)
    return 0 if found.plan.fits else 1
