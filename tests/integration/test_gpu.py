"""`make gpu-check` as a whole, in a process of its own: on a CPU all that a CPU can, at sizes for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu_check.checks import CHECKS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
# Checks that a machine without a GPU leaves out, each with its reason.
NEEDS_A_GPU = {
    "nf4": "needs a GPU",
    "vllm-lora": "on a CPU tests/integration/test_engine.py does this",
    "vllm-merge": "on a CPU tests/integration/test_engine.py does this",
    **dict.fromkeys(("vllm-fp8", "vllm-command", "vllm-turns", "vllm-ahead"), "needs a GPU"),
    **dict.fromkeys(("ranks-ddp", "ranks-fsdp", "tensor-parallel", "server-lora", "server-whole"), "needs 2 GPUs"),
}


def test_every_check_passes_or_names_what_this_machine_lacks(tmp_path):
    """The table has a line per check, and so have the data."""
    out = tmp_path / "table.md"
    command = [sys.executable, "-m", "tests.gpu_check", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    failed = [line for line in done.stderr.splitlines() if "FAILED" in line]
    assert done.returncode == 0, f"{failed}\n{out.with_suffix('.log').read_text()[-3000:]}"
    data = json.loads(out.with_suffix(".json").read_text())
    found = {each["name"]: each for each in data["checks"]}
    assert list(found) == [check.name for check in CHECKS]
    assert all(f"| `{name}`<br>" in done.stdout for name in found)
    assert out.read_text() in done.stdout
    if torch.cuda.is_available():
        return
    left_out = {name: each["reason"] for name, each in found.items() if each["result"] == "not here"}
    assert left_out.keys() == NEEDS_A_GPU.keys()
    assert all(reason.startswith(NEEDS_A_GPU[name]) for name, reason in left_out.items())
    assert all(each["device"].startswith("cpu, ") for each in found.values())
