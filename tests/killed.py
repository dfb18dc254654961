"""Runs for the test of kills: six steps without an interruption, and six that are killed within the fourth and resumed. Each run
has its own processes. They are forked from one process that has imported everything.

python -m tests.killed MODEL_FOLDER FOLDER
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from fuchsia_pl.callbacks.finite import FiniteGuard
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.callbacks.run_checkpoint import AtomicCheckpointIO, RunCheckpoint
from fuchsia_pl.objectives.config import LossConfig
from tests.doubles import make_data, make_module, make_trainer
from tests.forked import free_port

# (number of ranks, updates per phase) -> step of the last checkpoint before the kill.
CASES = {(1, 1): 3, (2, 2): 2}
KILLED_IN = 3  # counted from 0; with two updates per phase it is the second update of the second phase
NUM_STEPS = 6


class Killed(Callback):
    """Kills its process with SIGKILL between the two micro-batches of a step."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(model: Path, root: Path, num_updates: int, rank: int, environment: dict[str, str], ckpt: Path | None) -> None:
    """Runs one rank."""
    os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if environment else {})
    torch.manual_seed(0)
    module = make_module(model, LossConfig("ppo", num_policy_updates=num_updates), dropout=0.1)
    callbacks = [FiniteGuard(), RolloutLog(), RunCheckpoint(every_n_steps=1)]
    trainer = make_trainer(
        root,
        *callbacks,
        *([Killed()] if root.name == "killed" else []),
        accumulate_grad_batches=2,
        max_epochs=-1,
        max_steps=NUM_STEPS,
        log_every_n_steps=1,
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        logger=CSVLogger(root, name="", version=""),
        **({"devices": 2, "strategy": "ddp"} if environment else {}),
    )
    data = make_data(module, batch_size=2, steps_per_epoch=NUM_STEPS, sampling={"group_size": 2})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)


def run(model: Path, root: Path, num_ranks: int, num_updates: int, ckpt: Path | None = None) -> list[int | None]:
    """Runs all ranks; returns their exit codes."""
    environment = {}
    if num_ranks > 1:  # the variables that torchrun sets
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks))
        environment = {**sizes, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "killed"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    fork = multiprocessing.get_context("fork")
    arguments = [(model, root, num_updates, rank, environment, ckpt) for rank in range(num_ranks)]
    processes = [fork.Process(target=fit, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, folder = map(Path, sys.argv[1:])
    for ranks, updates in CASES:
        case = folder / f"{ranks}-{updates}"
        assert run(model, case / "straight", ranks, updates) == [0] * ranks
        assert run(model, case / "killed", ranks, updates) == [-signal.SIGKILL] * ranks
        last = case / "killed/checkpoints/last.ckpt"
        assert run(model, case / "resumed", ranks, updates, last) == [0] * ranks
