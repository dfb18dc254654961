"""Ten kills at random moments; `make chaos` runs a hundred."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ten_kills_change_nothing():
    """Runs in a separate process, which forks the runs and has no threads yet."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.chaos", "10", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = {what: int(number) for number, what in re.findall(r"^ *(\d+)  (.+)$", done.stdout, flags=re.MULTILINE)}
    assert counts["kills"] == 10
    assert any("to the trainer" in what for what in counts)
