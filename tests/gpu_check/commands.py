"""`fuchsia fit` as a user starts it: with a scripted engine, vLLM, turns, two devices, and a server on another device."""

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.fabric.plugins.environments.lightning import find_free_network_port

from tests.gpu_check.engine import GAPS, check_vllm
from tests.gpu_check.findings import Findings
from tests.gpu_check.machine import Machine, gpu_here, here
from tests.gpu_check.models import save_model
from tests.gpu_check.training import WORDS

ROOT = Path(__file__).parents[2]
NUM_STEPS = 3
VLLM, TINY = "fuchsia_pl.engines.vllm_colocated.VLLMColocatedEngine", "tests.doubles.TinyEngine"
CONFIG = """\
seed_everything: 3
trainer: {{accelerator: {accelerator}, devices: 1, precision: {precision}, max_steps: {steps}, limit_val_batches: 0}}
model:
  policy: {{name: {model}, dtype: {dtype}, lora: {{r: 8, alpha: 16}}}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-3}}}}
data:
  batch_size: 4
  steps_per_epoch: {steps}
  sampling: {{group_size: 4, max_completion_tokens: 16, max_length: 128}}
  environment: {{class_path: tests.doubles.TinyEnvironment}}
  engine:
    class_path: {engine}
    init_args: {init_args}
"""
# What each run on two devices adds. The sharded run merges, so that both ways of a sync are seen.
TWO_DEVICES: dict[str, list[str]] = {
    "ddp": ["--trainer.devices", "2", "--trainer.strategy", "ddp"],
    "fsdp": ["--config", "overlays/fsdp.yaml", "--trainer.devices", "2", "--data.engine.init_args.sync_mode", "merge"],
    "tensor": ["--data.engine.init_args.tensor_parallel_size", "2"],
}


def write_config(folder: Path, machine: Machine, engine: str) -> None:
    """Writes a model and `check.yaml`, a run of three steps."""
    save_model(folder / "model", machine, **WORDS)
    text = CONFIG.format(
        accelerator="gpu" if machine.is_gpu else "cpu",
        precision=machine.precision,
        steps=NUM_STEPS,
        model=folder / "model",
        dtype=machine.dtype,
        engine=engine,
        init_args="{enforce_eager: true}" if engine == VLLM else "{}",
    )
    (folder / "check.yaml").write_text(text)


def command(*words: str) -> list[str]:
    """The `fuchsia` command of this interpreter."""
    return [sys.executable, "-m", "fuchsia_pl", words[0], "--config", "check.yaml", *words[1:]]


def variables(**added: str) -> dict[str, str]:
    """The environment of a command, which imports the doubles of the tests."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, **added}


def train(findings: Findings, folder: Path, machine: Machine, words: Sequence[str]) -> None:
    """Runs three steps and compares the gap between engine and trainer at each with its bar."""
    with (folder / "output").open("w+") as output:
        code = subprocess.run(
            command("fit", *words), cwd=folder, env=variables(), stdout=output, stderr=output
        ).returncode
        output.seek(0)
        text = output.read()
    sys.stderr.write(text)
    lines = [line for line in text.splitlines() if line.strip()]
    findings.require(code == 0, f"exit code {code}" + (f": {lines[-1]}" if code and lines else ""))
    if code:
        return
    with (folder / "runs/check/0/metrics.csv").open() as stream:
        gaps = [float(row["train/logprob_gap"]) for row in csv.DictReader(stream) if row["train/logprob_gap"]]
    findings.bar("number of steps", len(gaps), "==", NUM_STEPS)
    findings.bar("largest gap of logprobs between trainer and engine", max(gaps), "<=", GAPS[machine.dtype])


def scripted(findings: Findings) -> None:
    """A run with the engine of the unit tests."""
    machine = here(findings)
    with TemporaryDirectory() as folder:
        write_config(Path(folder), machine, TINY)
        train(findings, Path(folder), machine, ())


def with_vllm(findings: Findings, words: Sequence[str]) -> None:
    """A run with vLLM beside the trainer on one GPU."""
    machine = gpu_here(findings)
    check_vllm()
    with TemporaryDirectory() as folder:
        write_config(Path(folder), machine, VLLM)
        train(findings, Path(folder), machine, words)


def on_two_devices(findings: Findings, what: str) -> None:
    """A run with two ranks, or with one vLLM over two GPUs."""
    machine = gpu_here(findings, num_devices=2)
    check_vllm()
    with TemporaryDirectory() as folder:
        write_config(Path(folder), machine, VLLM)
        train(findings, Path(folder), machine, TWO_DEVICES[what])


def with_server(findings: Findings, has_adapter: bool) -> None:
    """A run whose vLLM is a server on the second GPU; all weights go from GPU to GPU through vLLM's weight transfer."""
    machine = gpu_here(findings, num_devices=2)
    check_vllm()
    port = find_free_network_port()
    trained = [] if has_adapter else ["--model.policy.lora.enabled", "false"]
    with TemporaryDirectory() as made:
        folder = Path(made)
        write_config(folder, machine, VLLM)
        serve = command("serve", "--port", str(port), *trained)
        server = subprocess.Popen(serve, cwd=folder, env=variables(CUDA_VISIBLE_DEVICES="1"))
        try:
            urls = ["--config", "overlays/server.yaml", "--data.engine.init_args.urls", f"[http://127.0.0.1:{port}]"]
            train(findings, folder, machine, [*urls, *trained])
        finally:
            server.terminate()
            server.wait(60)
