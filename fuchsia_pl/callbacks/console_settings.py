"""The settings of a run, as they are printed before its first step."""

from lightning.pytorch import Trainer
from rich.table import Table
from rich.text import Text

from fuchsia_pl.callbacks.access import callbacks_of, data_of, module_of, policy_of
from fuchsia_pl.callbacks.memory_table import memory_table
from fuchsia_pl.callbacks.preflight import Preflight
from fuchsia_pl.engines.base import Engine
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.plan import MemoryPlan


def run_table(trainer: Trainer) -> Table:
    """Settings of a run as a table."""
    data, policy = data_of(trainer), policy_of(trainer)
    trained = sum(parameter.numel() for parameter in policy.trainable_parameters())
    total = sum(parameter.numel() for parameter in policy.parameters())
    adapter = f"LoRA r={data.served_model.lora_rank}" if data.served_model.lora_rank else "all weights"
    table = Table(show_header=False, box=None, pad_edge=False)
    bound = "" if policy.config.max_tokens_per_micro_batch is None else "at most "
    split = f"{bound}{trainer.accumulate_grad_batches} micro-batches on {trainer.world_size} rank(s)"
    for name, value in {
        "model": data.served_model.name,
        "trained": f"{trained:,} of {total:,} parameters ({adapter})",
        "objective": objective_text(module_of(trainer).loss_config),
        "rows per step": f"{data.rows_per_step} in {split}",
        "prompts": "computed once for all siblings" if policy.shares_prefix else "computed in each row",
        "engine": engine_text(data.engine),
        "run folder": trainer.default_root_dir,
    }.items():
        table.add_row(Text(name, style="dim"), Text(value))  # not strings, which are read as markup
    plans = memory_plans(trainer)
    for plan in plans:
        table.add_row(Text("memory", style="dim"), memory_table(plan))
    if not plans:
        table.add_row(Text("memory", style="dim"), Text("no plan: the trainer has no Preflight"))
    return table


def engine_text(engine: Engine) -> str:
    """The class of an engine, and the size of its cache on each device of the trainer, which it may have chosen itself."""
    cache = f", kv_cache_gb {engine.kv_cache_bytes / 2**30:.1f}" if engine.kv_cache_bytes else ""
    return type(engine).__name__ + cache


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
