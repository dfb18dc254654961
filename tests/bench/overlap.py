"""Sampling in parallel with training: duration of a step if engine and trainer each sleep for a fixed time."""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch import Callback

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from tests.bench.work import report
from tests.doubles import RecordedEngine, make_data, make_module, make_trainer, save_tiny_model

SAMPLING_S, TRAINING_S, NUM_STEPS = 1.0, 0.8, 7


class SlowTrainer(Callback):
    """Sleeps in each step, and records the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Called at the start of a step."""
        time.sleep(TRAINING_S)

    def on_train_batch_end(self, *args: Any) -> None:
        """Called at the end of a step."""
        self.ends.append(time.perf_counter())


def step_seconds(model: Path, root: Path, max_staleness: int) -> float:
    module, slow = make_module(model), SlowTrainer()
    engine, sampling = RecordedEngine(seconds=SAMPLING_S), {"max_staleness": max_staleness}
    data = make_data(module, engine, batch_size=2, steps_per_epoch=NUM_STEPS, sampling=sampling)
    make_trainer(root, slow, sync=AdapterSync(tolerance=100.0)).fit(module, datamodule=data)
    return median(after - before for before, after in zip(slow.ends, slow.ends[1:], strict=False))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder) / "model")
        both, beside = (step_seconds(model, Path(folder), staleness) for staleness in (0, 1))
    report(overlap_sum=both / (SAMPLING_S + TRAINING_S), overlap_max=beside / max(SAMPLING_S, TRAINING_S))


if __name__ == "__main__":
    main()
