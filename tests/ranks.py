"""Runs for the tests of several ranks: each process is a rank that Lightning launches, over gloo.

python -m tests.ranks equal|resume|uneven|fails|nonfinite|turns|memory MODEL_FOLDER FOLDER STRATEGY [NUMBER]
"""

import asyncio
import json
import os
import random
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.finite import FiniteGuard, NonFiniteError
from fuchsia_pl.callbacks.hotswap import HotSwap
from fuchsia_pl.callbacks.run_checkpoint import RunCheckpoint
from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.envs.parts import Part
from fuchsia_pl.library.mixture import Mixture
from fuchsia_pl.module import GRPOModule
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.config import CheckpointingSettings, LoRASettings, PolicyConfig
from fuchsia_pl.policy.sharding import FSDP2Strategy, local, whole
from fuchsia_pl.rollouts.config import CurriculumConfig
from fuchsia_pl.rollouts.teacher import TeacherConfig
from tests.doubles import RecordedEngine, TinyEnvironment, make_data, make_trainer

STRATEGIES = {
    "one": lambda: {"devices": 1},
    "ddp": lambda: {"devices": 2, "strategy": "ddp"},
    "fsdp": lambda: {"devices": 2, "strategy": FSDP2Strategy()},
    "fsdp-folder": lambda: {"devices": 2, "strategy": FSDP2Strategy(save_distributed_checkpoint=True)},
}
TEACHER = "teacher"  # folder of an adapter beside those of the strategies
# Kinds of policies by name; sharding handles each of them differently.
POLICIES = {
    "adapter": {},
    "adapter, clipped": {"clip": 0.05},
    "checkpointed": {"checkpointing": CheckpointingSettings(enabled=True)},
    "all weights": {"lora": LoRASettings(enabled=False)},
    "critic": {"loss": LossConfig("ppo", advantage="gae")},
    "plain rows": {"shared_prefix": "never"},
    # Two groups fit in only if they are short, so steps fill other numbers of micro-batches than planned.
    "budget": {"max_tokens_per_micro_batch": 44},
    "mini-batches": {"loss": LossConfig("ppo", mini_batches=5), "batch_size": 10},
    # Eight items, so that the third step depends on the success that both ranks measured before.
    "curriculum": {
        "environment": lambda: TinyEnvironment(num_items=8),
        "curriculum": CurriculumConfig(success=0.8, recheck_phases=2),
    },
    # One item in four is of a part with groups of its own size, so a rank has none of it in some steps.
    "mixture": {
        "environment": lambda: Mixture(
            {"many": Part(TinyEnvironment(), weight=3.0), "few": Part(TinyEnvironment(5), group_size=2)}
        )
    },
    "teacher's prompt": {"teacher": {"prompt": "you add"}, "max_tokens_per_micro_batch": 60},
    "teacher's adapter": {"teacher": {"adapter": TEACHER}},
}


# The variables of several ranks, which a run of one process must not have.
RANK_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
# SGD, since Adam makes full steps even from gradients that are only rounding errors.
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.AdamW, lr=1e-2)


def fit(model: Path, root: Path, strategy: str, policy: str, num_steps: int, optimizer=SGD, ckpt_path=None) -> Trainer:
    """Trains on recorded rollouts; writes a checkpoint and the export."""
    seed_everything(0, verbose=False)
    chosen = dict(POLICIES[policy])
    clip, loss = chosen.pop("clip", None), chosen.pop("loss", LossConfig(beta=0.01))
    batch_size, environment = chosen.pop("batch_size", 4), chosen.pop("environment", TinyEnvironment)()
    sampling, teacher = {"curriculum": chosen.pop("curriculum", None)}, dict(chosen.pop("teacher", {}))
    if "adapter" in teacher:
        teacher["adapter"] = str(root.parents[1] / TEACHER)
    config = PolicyConfig(str(model), "float32", **{"lora": LoRASettings(r=4, alpha=8), **chosen})
    module = GRPOModule(config, loss, optimizer)
    given = {"batch_size": batch_size, "steps_per_epoch": 5, "teacher": TeacherConfig(**teacher) if teacher else None}
    data = make_data(module, RecordedEngine(), environment, sampling=sampling, **given)
    trainer = make_trainer(
        root,
        AdapterExport(),
        sync=AdapterSync(tolerance=100.0),
        accumulate_grad_batches=1 if config.max_tokens_per_micro_batch else 2,
        max_epochs=-1,
        max_steps=num_steps,
        log_every_n_steps=1,
        gradient_clip_val=clip,
        **{"logger": CSVLogger(root, name="", version=""), **STRATEGIES[strategy]()},
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(root / "end.ckpt")
    weights = {name: whole(p.detach()) for name, p in module.policy.named_parameters() if p.requires_grad}
    if trainer.is_global_zero:
        torch.save(weights, root / "weights.pt")
    trainer.strategy.barrier("the last gather has reached every rank")
    return trainer


def equal(model: Path, root: Path, strategy: str) -> None:
    """Trains five steps of each kind of policy."""
    for number, policy in enumerate(POLICIES):
        fit(model, root / str(number), strategy, policy, num_steps=5)


def resume(model: Path, root: Path, strategy: str) -> None:
    """Trains two steps with one strategy, then three more with another."""
    before, after = strategy.split("+")
    for num_steps in (1, 2):  # the second checkpoint replaces the first
        fit(model, root / "before", before, "adapter", num_steps, ADAM)
    saved = root / "before/end.ckpt"
    if saved.is_dir() and not int(os.environ.get("LOCAL_RANK", "0")):  # the state after a kill between the two renames
        saved.rename(saved.with_name(".end.ckpt.older"))
    if after == "one" and int(os.environ.get("LOCAL_RANK", "0")):
        return  # otherwise the second process would be another run that writes the same files
    if after == "one":
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
    fit(model, root / "after", after, "adapter", 5, ADAM, ckpt_path=root / "before/end.ckpt")
    fit(model, root / "straight", after, "adapter", 5, ADAM)


class RandomSpread(TinyEnvironment):
    """Each item's group has spread or not, at random."""

    def __init__(self, seed: int) -> None:
        super().__init__(num_items=60)
        numbers = random.Random(seed)
        share = numbers.random()
        self.spreads = [numbers.random() < share for _ in range(self.num_items)]

        def by_coin(rollouts, *args, **kwargs):
            return [float(r.sibling) if self.spreads[r.item["n"]] else 0.0 for r in rollouts]

        self.reward_functions, self.reward_weights = [by_coin], {}


def uneven(model: Path, root: Path, strategy: str, num_patterns: int) -> None:
    """Makes short runs in which each rank drops and refills other groups, with random numbers of micro-batches."""
    for seed in range(num_patterns):
        numbers = random.Random(seed)
        seed_everything(0, verbose=False)
        budget = 44 if seed % 2 else None
        settings = {"lora": LoRASettings(r=4, alpha=8), "max_tokens_per_micro_batch": budget}
        config = PolicyConfig(str(model), "float32", **settings)
        max_refills, batch_size = numbers.randrange(3), numbers.choice([2, 4, 6])
        # Three groups on each rank, of which some ranks keep fewer: then a mini-batch has rows on one rank only, or on none.
        loss = LossConfig("dapo", max_refills=max_refills, mini_batches=3 if batch_size == 6 else 1)
        module = GRPOModule(config, loss, ADAM)
        data = make_data(module, RecordedEngine(), RandomSpread(seed), batch_size=batch_size, steps_per_epoch=3)
        trainer = make_trainer(
            root,
            sync=AdapterSync(tolerance=100.0),
            accumulate_grad_batches=numbers.choice([1, 2, 3, 5]) if budget is None else 1,
            **STRATEGIES[strategy](),
        )
        trainer.fit(module, datamodule=data)
        assert trainer.global_step == 3


class FailingLoad(RecordedEngine):
    """Refuses the version `fails_at` on the rank `on_rank`."""

    async def load_weights(self, path: Path, version: int) -> None:
        if version == self.fails_at:
            raise EngineError(f"no room for version {version}")
        await super().load_weights(path, version)


def fails(model: Path, root: Path, strategy: str, rank: int) -> None:
    """The engine of one rank fails, at a sync (ranks 0 and 1) or while it samples (ranks 10 and 11); the run must end."""
    seed_everything(0, verbose=False)
    config = PolicyConfig(str(model), "float32", lora=LoRASettings(r=4, alpha=8))
    module = GRPOModule(config, LossConfig(), ADAM)
    engine = (RecordedEngine if rank >= 10 else FailingLoad)(fails_at=1, on_rank=rank % 10)
    trainer = make_trainer(root, sync=AdapterSync(tolerance=100.0), **STRATEGIES[strategy]())
    trainer.fit(module, datamodule=make_data(module, engine, batch_size=4, steps_per_epoch=3))


class PoisonedRank(Callback):
    """Writes NaN into a gradient, a loss or the optimizer state of rank 1 alone, in step 1 (counted from 0)."""

    def __init__(self, what: str) -> None:
        self.what = what

    def _acts(self, trainer: Trainer, what: str) -> bool:
        return self.what == what and trainer.global_rank == 1 and trainer.global_step == 1

    def on_after_backward(self, trainer, pl_module):
        if self._acts(trainer, "gradient"):
            gradients = [local(p.grad) for p in pl_module.policy.trainable_parameters() if p.grad is not None]
            for part in gradients:  # FSDP has no gradients before the last micro-batch
                part.fill_(torch.nan)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self._acts(trainer, "state"):
            parts = [local(state["momentum_buffer"]) for state in optimizer.state.values()]
            max(parts, key=torch.numel).view(-1)[0] = torch.nan

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self._acts(trainer, "loss") and batch_idx % 2 == 0:
            step = GRPOModule.training_step.__get__(pl_module)
            pl_module.training_step = lambda batch, batch_idx: step(batch, batch_idx) * torch.nan
        else:
            pl_module.__dict__.pop("training_step", None)


def nonfinite(model: Path, root: Path, strategy: str) -> None:
    """A NaN on one rank in one of three steps: all ranks skip the step, or stop if it is in the optimizer state."""
    for what in ("gradient", "loss", "state"):
        seed_everything(0, verbose=False)
        config = PolicyConfig(str(model), "float32", lora=LoRASettings(r=4, alpha=8))
        module = GRPOModule(config, LossConfig(), SGD)
        folder = root / what
        trainer = make_trainer(
            folder,
            FiniteGuard(),
            PoisonedRank(what),
            AdapterExport(),
            RunCheckpoint(every_n_steps=1),
            sync=AdapterSync(tolerance=100.0),
            accumulate_grad_batches=2,
            max_epochs=-1,
            max_steps=3,
            gradient_clip_val=1.0,
            enable_checkpointing=True,
            log_every_n_steps=1,
            **{"logger": CSVLogger(folder, name="", version=""), **STRATEGIES[strategy]()},
        )
        data = make_data(module, RecordedEngine(), batch_size=4, steps_per_epoch=5)
        stopped = False
        try:
            trainer.fit(module, datamodule=data)
        except NonFiniteError:
            stopped = True
        assert stopped == (what == "state"), what
        weights = [local(p.detach()) for p in module.policy.trainable_parameters()]
        assert stopped or all(part.isfinite().all() for part in weights), what


class Timeline(Callback):
    """The times at which a rank's engine sleeps and wakes and its micro-batches start and end. Rank 1 is slow."""

    def __init__(self) -> None:
        self.events: list[tuple[str, float]] = []

    def add(self, event: str) -> None:
        self.events.append((event, time.monotonic()))  # the same clock in all processes of a machine

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.add("forward")


class SlowEnd(Callback):
    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(0.3 * trainer.global_rank)
        self.timeline.add("trained")


class SleepingEngine(RecordedEngine):
    can_sleep = True

    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self.timeline = timeline

    async def sleep(self) -> None:
        await asyncio.sleep(0.3 * int(os.environ.get("LOCAL_RANK", "0")))
        self.timeline.add("asleep")

    async def wake(self) -> None:
        self.timeline.add("wakes")


def turns(model: Path, root: Path, strategy: str) -> None:
    """Trains two steps with HotSwap and without it."""
    for is_shared in (True, False):
        seed_everything(0, verbose=False)
        config = PolicyConfig(str(model), "float32", lora=LoRASettings(r=4, alpha=8))
        module, timeline = GRPOModule(config, LossConfig(beta=0.01), ADAM), Timeline()
        callbacks = [SlowEnd(timeline), HotSwap(is_shared), timeline]
        trainer = make_trainer(root, *callbacks, sync=AdapterSync(tolerance=100.0), **STRATEGIES[strategy]())
        data = make_data(module, SleepingEngine(timeline), batch_size=4, steps_per_epoch=2)
        trainer.fit(module, datamodule=data)
        weights = {name: whole(p.detach()) for name, p in module.policy.named_parameters() if p.requires_grad}
        if trainer.is_global_zero:
            torch.save(weights, root / f"weights-{is_shared}.pt")
        if is_shared:
            (root / f"timeline-{trainer.global_rank}.json").write_text(json.dumps(timeline.events))
        trainer.strategy.barrier("the last gather has reached every rank")


class MeasuredModule(GRPOModule):
    """Records the memory that loading and sharding a model take on a rank, in bytes."""

    def configure_model(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present value
        before = self._peak()
        super().configure_model()
        peak = self._peak() - before
        shard = sum(local(p).nbytes for p in self.policy.parameters())
        folder = Path(self.trainer.default_root_dir)
        found = {"peak": peak, "shard": shard, "shares_prefix": self.policy.shares_prefix}
        (folder / f"memory-{self.trainer.global_rank}.json").write_text(json.dumps(found))

    def _peak(self) -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024


def memory(model: Path, root: Path, strategy: str) -> None:
    """Loads a model, and trains a step with it."""
    root.mkdir(exist_ok=True)
    seed_everything(0, verbose=False)
    module = MeasuredModule(PolicyConfig(str(model), "float32", lora=LoRASettings(r=4, alpha=8)), LossConfig(), SGD)
    trainer = make_trainer(root, sync=AdapterSync(tolerance=100.0), max_steps=1, **STRATEGIES[strategy]())
    trainer.fit(module, datamodule=make_data(module, RecordedEngine(), batch_size=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, model, root, strategy, *numbers = sys.argv[1:]
    tasks = {"equal": equal, "resume": resume, "uneven": uneven, "fails": fails, "nonfinite": nonfinite}
    tasks |= {"turns": turns, "memory": memory}
    start = time.perf_counter()
    tasks[what](Path(model), Path(root), strategy, *map(int, numbers))
    sys.stderr.write(f"{what} {strategy}: {time.perf_counter() - start:.1f} s\n")
