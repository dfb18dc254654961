"""For whoever has a GPU: the quickstart's first steps with both ways to sync, compiled. Nobody has run this file yet."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.gpu]


@pytest.mark.parametrize("sync_mode", ["lora", "merge"])
def test_three_steps_agree_with_the_engine(tmp_path, sync_mode):
    command = [
        Path(sys.executable).parent / "fuchsia",
        "fit",
        "--config",
        "quickstart.yaml",
        "--trainer.max_steps",
        "3",
    ]
    engine = ["--data.engine.init_args.sync_mode", sync_mode, "--data.engine.init_args.enforce_eager", "false"]
    done = subprocess.run(
        [*command, *engine, "--trainer.accelerator", "gpu"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (tmp_path / "runs/quickstart/0/metrics.csv").open() as stream:
        gaps = [float(row["train/logprob_gap"]) for row in csv.DictReader(stream) if row["train/logprob_gap"]]
    assert len(gaps) == 3
    assert max(gaps) < 0.15
