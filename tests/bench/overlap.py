"""Sampling beside training: how long a step takes of an engine and a trainer that each do nothing for a fixed time."""

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
    """Sleeps in each step, and notes when it ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """The step begins."""
        time.sleep(TRAINING_S)

    def on_train_batch_end(self, *args: Any) -> None:
        """The step ends."""
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
