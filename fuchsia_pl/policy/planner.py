"""Plans a run, and finds settings that make it fit or that save most memory."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from fuchsia_pl.policy.plan import GIB, MemoryPlan, PlannedRun, fewest_rows, memory_plan
from fuchsia_pl.policy.plan_simulation import Simulator
from fuchsia_pl.policy.plan_sizes import Activations, MicroBatch, Weights
from fuchsia_pl.types import ConfigError

T = TypeVar("T")

NUM_OPTIONS = 3
SMALLEST_CACHE_GB = 0.5
# Share of the available memory that a setting has to save.
SMALLEST_SHARE = 0.002
# The option and the run with it, None where it does not apply.
Changed = tuple[str, PlannedRun] | None


@dataclass(frozen=True)
class Change:
    """A setting that saves memory.

    Attributes:
        setting: Its name. Two changes of one setting are never combined.
        cost: Estimated share of a step's time that it costs. It orders the options and has no other use. Above 1 it also changes
            what is learned.
        apply: Applies it to a run.
    """

    setting: str
    cost: float
    apply: Callable[[PlannedRun], Changed]


class Planner:
    """Plans runs of one model on one device.

    Args:
        simulator: Simulates micro-batches of the model.
        largest: The largest micro-batch of a run.
        available: Bytes that a run may use.
    """

    def __init__(self, simulator: Simulator, largest: Callable[[PlannedRun], MicroBatch], available: int) -> None:
        self.simulator = simulator
        self.largest = largest
        self.available = available

    def plan(self, run: PlannedRun) -> MemoryPlan:
        """The plan of a run.

        Raises:
            ConfigError: The model cannot be simulated.
        """
        return memory_plan(run, *self.needs(run), self.available)

    def needs(self, run: PlannedRun) -> tuple[Weights, Activations]:
        """Sizes of the policy's weights, and what the largest micro-batch needs beside them.

        Raises:
            ConfigError: The model cannot be simulated.
        """
        return self.simulator.run(run.policy, self.largest(run))

    def options(self, run: PlannedRun) -> list[str]:
        """The three cheapest sets of options with each of which the run fits; fewer if there are no more."""
        found: list[tuple[set[str], str]] = []
        for changes in self._sets(run):
            settings = {change.setting for change in changes}
            if any(known <= settings for known, _ in found):
                continue
            changed = _applied(run, changes)
            if changed is not None and self._of_plan(changed[1], lambda plan: plan.fits):
                found.append((settings, changed[0]))
            if len(found) == NUM_OPTIONS:
                break
        return [words for _, words in found]

    def savings(self, run: PlannedRun) -> list[tuple[str, int]]:
        """The three settings that save most, each as an option with the bytes that it saves."""
        before = self.plan(run).total
        best: dict[str, tuple[str, int]] = {}
        for change in CHANGES:
            changed = change.apply(run)
            if changed is not None:
                saved = self._of_plan(changed[1], lambda plan: before - plan.total) or 0
                best[change.setting] = max(
                    best.get(change.setting, ("", 0)), (changed[0], saved), key=lambda entry: entry[1]
                )
        saving = sorted(best.values(), key=lambda entry: entry[1], reverse=True)
        return [entry for entry in saving if entry[1] > 0][:NUM_OPTIONS]

    def _of_plan(self, run: PlannedRun, read: Callable[[MemoryPlan], T]) -> T | None:
        """What `read` finds in the plan of a run; None if it cannot be planned, as with settings that exclude each other."""
        try:
            return read(self.plan(run))
        except ConfigError:
            return None

    def _sets(self, run: PlannedRun) -> Iterator[Sequence[Change]]:
        """Sets of up to three changes of different settings, the cheapest first, without those that save next to nothing."""
        useful = [change for change in CHANGES if self._may_help(run, change)]
        sets = [
            changes
            for number in range(1, NUM_OPTIONS + 1)
            for changes in itertools.combinations(useful, number)
            if len({change.setting for change in changes}) == number
        ]
        return iter(sorted(sets, key=lambda changes: sum(change.cost for change in changes)))

    def _may_help(self, run: PlannedRun, change: Change) -> bool:
        changed = change.apply(run)
        if changed is None:  # but perhaps after another change
            return True
        before = self.plan(run).total
        return (self._of_plan(changed[1], lambda plan: before - plan.total) or 0) > SMALLEST_SHARE * self.available


def _applied(run: PlannedRun, changes: Sequence[Change]) -> Changed:
    words = []
    for change in changes:
        changed = change.apply(run)
        if changed is None:
            return None
        words.append(changed[0])
        run = changed[1]
    return " ".join(words), run


def _smaller_micro_batches(factor: int) -> Callable[[PlannedRun], Changed]:
    def apply(run: PlannedRun) -> Changed:
        budget = run.policy.max_tokens_per_micro_batch
        if budget is None:
            number = run.num_micro_batches * factor
            if number > run.num_rows:
                return None
            return f"--trainer.accumulate_grad_batches {number}", replace(run, num_micro_batches=number)
        size = budget // factor
        if size < run.longest_row:
            return None
        policy = replace(run.policy, max_tokens_per_micro_batch=size)
        return f"--model.policy.max_tokens_per_micro_batch {size}", replace(run, policy=policy)

    return apply


def _smaller_cache(factor: int) -> Callable[[PlannedRun], Changed]:
    def apply(run: PlannedRun) -> Changed:
        engine = run.engine
        if engine is None or not engine.kv_cache:  # it has none, or takes what is free
            return None
        size = engine.kv_cache / factor / GIB
        if size < SMALLEST_CACHE_GB or size * GIB < fewest_rows(run):
            return None
        engine = replace(engine, kv_cache=int(size * GIB))
        return f"--data.engine.init_args.kv_cache_gb {size:g}", replace(run, engine=engine)

    return apply


def _fewer_requests(run: PlannedRun) -> Changed:
    engine = run.engine
    if engine is None or engine.max_num_seqs < 2 * run.group_size:
        return None
    number = engine.max_num_seqs // 2
    return f"--data.engine.init_args.max_num_seqs {number}", replace(run, engine=replace(engine, max_num_seqs=number))


def _eager(run: PlannedRun) -> Changed:
    if run.engine is None or not run.engine.graphs:
        return None
    return "--data.engine.init_args.enforce_eager true", replace(run, engine=replace(run.engine, graphs=0))


def _checkpointing(run: PlannedRun) -> Changed:
    settings = run.policy.checkpointing
    if settings.enabled:
        return None
    policy = replace(run.policy, checkpointing=replace(settings, enabled=True))
    return "--model.policy.checkpointing.enabled true", replace(run, policy=policy)


def _offloading(run: PlannedRun) -> Changed:
    settings = run.policy.checkpointing
    if not run.is_gpu or not settings.enabled or settings.cpu_offloading or settings.every_n_layers > 1:
        return None
    policy = replace(run.policy, checkpointing=replace(settings, cpu_offloading=True))
    return "--model.policy.checkpointing.cpu_offloading true", replace(run, policy=policy)


def _sharding(run: PlannedRun) -> Changed:
    if run.num_ranks == 1 or run.is_sharded or run.policy.quantization is not None:
        return None
    return "--config overlays/fsdp.yaml", replace(run, is_sharded=True)


def _hotswap(run: PlannedRun) -> Changed:
    if run.engine is None or not run.is_gpu or run.shares_device or not run.can_share_device:
        return None
    return "--hotswap.enabled true", replace(run, shares_device=True)


def _four_bits(run: PlannedRun) -> Changed:
    policy = run.policy
    if not run.is_gpu or not policy.lora.enabled or policy.quantization is not None or run.is_sharded:
        return None
    return "--model.policy.quantization nf4", replace(run, policy=replace(policy, quantization="nf4"))


def _lower_rank(run: PlannedRun) -> Changed:
    lora = run.policy.lora
    if not lora.enabled or lora.r < 2 or lora.init_from is not None:
        return None
    policy = replace(run.policy, lora=replace(lora, r=lora.r // 2))
    return f"--model.policy.lora.r {lora.r // 2}", replace(run, policy=policy)


CHANGES = (
    Change("micro-batches", 0.02, _smaller_micro_batches(2)),
    Change("micro-batches", 0.05, _smaller_micro_batches(4)),
    Change("cache", 0.05, _smaller_cache(2)),
    Change("cache", 0.15, _smaller_cache(4)),
    Change("requests", 0.1, _fewer_requests),
    Change("sharding", 0.2, _sharding),
    Change("checkpointing", 0.25, _checkpointing),  # one more forward of three
    Change("graphs", 0.3, _eager),
    Change("offloading", 0.3, _offloading),
    Change("hotswap", 0.3, _hotswap),
    Change("quantization", 0.6, _four_bits),
    Change("rank", 1.5, _lower_rank),
)
