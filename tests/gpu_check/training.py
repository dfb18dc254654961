"""Runs of the trainer in this process: ten steps and a resume, turns with an engine, FSDP2."""

import os
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from fuchsia_pl.callbacks.adapter_sync import GAP_METRIC, AdapterSync
from fuchsia_pl.callbacks.hotswap import HotSwap
from fuchsia_pl.callbacks.preflight import Preflight
from fuchsia_pl.engines.base import Engine
from fuchsia_pl.module import GRPOModule
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.sharding import FSDP2Strategy, whole
from tests.doubles import ALPHABET, RecordedEngine, TinyEngine, make_data
from tests.gpu_check.findings import Findings
from tests.gpu_check.machine import GIB, Machine, here
from tests.gpu_check.models import relative, save_model

# Ids that the tokenizer of the unit tests decodes; small, since a scripted engine samples row by row on the CPU.
WORDS = {"vocab_size": 4 + len(ALPHABET), "num_hidden_layers": 2}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Gaps(Callback):
    """Keeps the gap between engine and trainer of each step."""

    def __init__(self) -> None:
        self.gaps: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self.gaps.append(float(trainer.callback_metrics[GAP_METRIC]))


def run(
    model: Path, root: Path, machine: Machine, steps: int, engine: Engine, *callbacks: Callback, **settings: Any
) -> tuple[GRPOModule, Trainer]:
    """Trains `steps` optimizer steps. `optimizer` is a setting of the module, `ckpt_path` of `fit`, the others of the trainer."""
    os.environ.pop(
        "PL_GLOBAL_SEED", None
    )  # with it, Lightning seeds again at the setup of a distributed strategy, and of no other
    torch.manual_seed(0)
    optimizer = settings.pop("optimizer", partial(torch.optim.AdamW, lr=1e-2))
    ckpt_path = settings.pop("ckpt_path", None)
    config = PolicyConfig(str(model), machine.dtype, LoRASettings(r=4, alpha=8))
    module = GRPOModule(config, LossConfig(beta=0.01), optimizer)
    trainer = Trainer(
        accelerator="gpu" if machine.is_gpu else "cpu",
        precision=machine.precision,
        default_root_dir=root,
        callbacks=[*callbacks, AdapterSync(tolerance=1e3 if isinstance(engine, RecordedEngine) else 0.2)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        max_epochs=-1,
        max_steps=steps,
        **{"devices": 1, **settings},
    )
    trainer.fit(module, datamodule=make_data(module, engine, batch_size=3), ckpt_path=ckpt_path)
    return module, trainer


def trained(module: GRPOModule) -> Tensor:
    """The trained weights as one vector, on the CPU."""
    assert module.policy is not None
    return torch.cat([whole(p.detach()).flatten().cpu() for p in module.policy.trainable_parameters()])


def fit(findings: Findings) -> None:
    """Ten steps, and the same ten as five, a checkpoint and five more. The engine samples on the CPU."""
    machine, gaps = here(findings), Gaps()
    with TemporaryDirectory() as made:
        root = Path(made)
        model = save_model(root / "model", machine, **WORDS)
        start = time.perf_counter()
        straight, _ = run(model, root, machine, 10, TinyEngine(), gaps, Preflight())
        findings.note(f"ten steps in {time.perf_counter() - start:.1f} s", gaps=gaps.gaps)
        allowed = 1e-3 if machine.dtype == "float32" else 0.15
        findings.bar("largest gap of logprobs between trainer and engine", max(gaps.gaps), "<=", allowed)
        _, first = run(model, root, machine, 5, TinyEngine())
        first.save_checkpoint(root / "five.ckpt")
        resumed, _ = run(model, root, machine, 10, TinyEngine(), ckpt_path=root / "five.ckpt")
        if torch.equal(trained(resumed), trained(straight)):
            findings.require(True, "the resume is equal bit for bit")
            return
        again, _ = run(model, root, machine, 10, TinyEngine())
        repeat, resume = (relative(trained(each), trained(straight)) for each in (again, resumed))
        text = f"the resume differs by {resume:.2g}, a second run of the ten steps by {repeat:.2g}"
        findings.require(machine.is_gpu and 0 < resume <= 10 * repeat, text, resume=resume, repeat=repeat)


class SleepingEngine(RecordedEngine):
    """A recorded engine that takes turns with the trainer, and measures the trainer's memory in its own turn."""

    can_sleep = True

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine, self.held = machine, []

    async def sleep(self) -> None: ...

    async def wake(self) -> None:
        self.held.append(self.machine.allocated())


class TimedSwap(HotSwap):
    """Measures each change of turns, and the memory of the trainer's own turn."""

    def __init__(self, machine: Machine, enabled: bool) -> None:
        super().__init__(enabled)
        self.machine, self.held, self.seconds = machine, [], {"to the host": [], "to the device": []}

    def to_engine(self, trainer: Trainer) -> None:
        self._timed("to the host", super().to_engine, trainer)

    def to_trainer(self, trainer: Trainer) -> None:
        self._timed("to the device", super().to_trainer, trainer)

    def _timed(self, name: str, move: Any, trainer: Trainer) -> None:
        owner, start = self.owner, time.perf_counter()
        move(trainer)
        self.machine.wait()
        if self.owner is not owner:
            self.seconds[name].append(time.perf_counter() - start)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.held.append(self.machine.allocated())


def turns(findings: Findings) -> None:
    """Two steps with and without turns, under both kinds of AdamW: a fused one keeps its step counter on the GPU."""
    machine = here(findings)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8} if machine.is_gpu else {}
    with TemporaryDirectory() as made:
        root = Path(made)
        model = save_model(root / "model", machine, **{**WORDS, **sizes})
        for name, fused in (("fused AdamW", True), ("AdamW", False)):
            adam = partial(torch.optim.AdamW, lr=1e-2, fused=fused)
            plain, _ = run(model, root, machine, 2, RecordedEngine(), optimizer=adam)
            expected = trained(plain)
            del plain
            engine, swap = SleepingEngine(machine), TimedSwap(machine, True)
            module, _ = run(model, root, machine, 2, engine, swap, optimizer=adam)
            durations = ", ".join(f"{min(found):.3f} s {where}" for where, found in swap.seconds.items())
            findings.note(f"{name}: {durations}", **swap.seconds)
            allowed = 1e-2 if machine.is_gpu else 0.0
            findings.bar(
                f"{name}: relative difference of the weights", relative(trained(module), expected), "<=", allowed
            )
            if machine.is_gpu:
                own = min(swap.held) / GIB
                text = f"{name}: GiB of the trainer in the engine's turn ({own:.2f} in its own)"
                findings.bar(text, max(engine.held) / GIB, "<=", 0.05 * own)
    if not machine.is_gpu:
        findings.note("memory: left out, a CPU has one memory for both sides")


def fsdp2(findings: Findings) -> None:
    """Three steps sharded over one rank, which runs every collective operation, and three on one device."""
    machine = here(findings)
    with TemporaryDirectory() as made:
        root = Path(made)
        model = save_model(root / "model", machine, **WORDS)
        plain, _ = run(model, root, machine, 3, RecordedEngine(), optimizer=SGD)
        expected = trained(plain)
        module, trainer = run(model, root, machine, 3, RecordedEngine(), optimizer=SGD, strategy=FSDP2Strategy())
        backend = torch.distributed.get_backend()
        trainer.save_checkpoint(root / "sharded.ckpt")
        difference = relative(trained(module), expected)
        allowed = EXACT_SHARDED[machine.dtype]
        findings.bar(f"{backend}, three steps: relative difference of the weights", difference, "<=", allowed)
        resumed, _ = run(model, root, machine, 3, RecordedEngine(), optimizer=SGD, ckpt_path=root / "sharded.ckpt")
        loaded = torch.equal(trained(resumed), trained(module))
        findings.require(loaded, "its checkpoint loads on one device, bit for bit")


EXACT_SHARDED = {"float32": 1e-4, "bfloat16": 2e-2}
