"""Whole steps under `fuchsia fit`: seconds by part, sync, peak memory, and how the cost grows with prompts and completions."""

import csv
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch import Callback

from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.engines.base import SamplingParams
from fuchsia_pl.types import Completion
from tests.bench.work import NUM_STEPS, report
from tests.integration.kept_engine import KeptEngine

NUM_SCALING_STEPS = 5
# These steps contain four probes of the sync, which need the reference; with `beta: 0` nothing else needs it.
NUM_PROBED_STEPS = 9
WORK = ["--model.loss.beta", "0.0", "--model.optimizer.init_args.lr", "2.0e-4"]
# The quickstart's rewards, with which groups without spread do not enter the forward, and rewards with spread in every group.
ENVIRONMENTS = {"own": "fuchsia_pl.library.arithmetic.Arithmetic", "every": "tests.bench.work.Addition"}


class TimedEngine(KeptEngine):
    """The kept engine, which measures the seconds with requests in flight."""

    busy_s, num_open, since = 0.0, 0, 0.0

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        if self.num_open == 0:
            self.since = time.perf_counter()
        self.num_open += 1
        try:
            return await super().generate(prompt_ids, sampling)
        finally:
            self.num_open -= 1
            if self.num_open == 0:
                self.busy_s += time.perf_counter() - self.since


class PartTimer(Callback):
    """Seconds of sampling, of forward and backward, and of the whole, per step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.training_s, self.batch_start, self.step_start = 0.0, 0.0, 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.step_start, TimedEngine.running[0].busy_s = time.perf_counter(), 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch_start = time.perf_counter()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.training_s += time.perf_counter() - self.batch_start

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            now, engine = time.perf_counter(), TimedEngine.running[0]
            step = {"step": now - self.step_start, "sampling": engine.busy_s, "training": self.training_s}
            self.steps.append(step)
            self.step_start, engine.busy_s, self.training_s = now, 0.0, 0.0


def fit(num_steps: int, *overrides: str, num_left_out: int = 1) -> dict[str, float]:
    """Median seconds of the steps of a run of the quickstart's work, without the first ones."""
    timer = PartTimer()
    os.chdir(tempfile.mkdtemp())

    class Timed(FuchsiaCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Any:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.insert(0, timer)  # without the time of other callbacks after backward
            return trainer

    cli = Timed(
        ["fit", "--config", "quickstart.yaml", "--trainer.max_steps", str(num_left_out + num_steps),
         "--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0",
         "--data.engine", "tests.bench.step.TimedEngine", *WORK, *overrides]
    )  # fmt: skip
    with (Path(cli.trainer.default_root_dir) / "metrics.csv").open() as stream:
        syncs = [float(row["sync/seconds"]) for row in csv.DictReader(stream) if row.get("sync/seconds")]
    steps = timer.steps[num_left_out:]
    found = {part: median(step[part] for step in steps) for part in ("step", "sampling", "training")}
    rests = [step["step"] - step["sampling"] - step["training"] for step in steps]
    shares = [rest / step["step"] for rest, step in zip(rests, steps, strict=True)]
    sys.stderr.write(f"{overrides}: {timer.steps}\n")
    sync = median(syncs[num_left_out:])
    return {**found, "rest_share": median(shares), "rest": median(rests) - sync, "sync": sync}


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    figures = {}
    for tokens in (32, 64):
        for name, environment in ENVIRONMENTS.items():
            length = ["--data.sampling.max_completion_tokens", str(tokens)]
            found = fit(NUM_STEPS, "--data.environment", environment, *length)
            figures |= {f"{name}_{part}_{tokens}": seconds for part, seconds in found.items()}
        # Of the first run: later runs in the same process would increase it.
        figures.setdefault("trainer_peak_gb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    later = fit(NUM_STEPS, "--data.environment", ENVIRONMENTS["own"], num_left_out=NUM_PROBED_STEPS)
    figures["later_rest_share"] = later["rest_share"]
    for prompts, group in ((4, 8), (8, 8), (16, 8), (4, 16), (4, 32)):
        sizes = ["--data.batch_size", str(prompts), "--data.sampling.group_size", str(group)]
        accumulate = str(max(prompts * group // 32, 1))
        found = fit(
            NUM_SCALING_STEPS,
            "--data.environment",
            ENVIRONMENTS["every"],
            *sizes,
            "--trainer.accumulate_grad_batches",
            accumulate,
        )
        figures[f"scaling_{prompts}x{group}"] = found["sampling"] + found["training"]
    KeptEngine.end()
    # The peak of vLLM's worker, with its weights, keys and values, is known only after it has ended.
    figures["worker_peak_gb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    report(**figures)


if __name__ == "__main__":
    main()
