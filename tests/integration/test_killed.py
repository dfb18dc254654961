"""Real vLLM beside a trainer that is killed or receives SIGTERM: no process, shared memory or file is left."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from fuchsia_pl import orphans, scratch
from tests import doubles

ROOT = Path(__file__).parents[2]
START_S, END_S = 600.0, 10.0
LEFT = ("fuchsia-", "psm_", "sem.mp-")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Folder of a tiny model with attention heads of a size that vLLM supports."""
    folder = tmp_path_factory.mktemp("killed")
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doubles, "LlamaConfig", lambda **settings: LlamaConfig(**{**settings, **sizes}))
        doubles.save_tiny_model(folder / "model")
    engine = {"kv_cache_gb": 0.2, "enforce_eager": True, "max_num_seqs": 8}
    settings = {
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "max_steps": 500,
            "max_epochs": -1,
            "limit_val_batches": 0,
        },
        "model": {"policy": {"name": str(folder / "model"), "dtype": "float32", "lora": {"r": 4, "alpha": 8}}},
        "data": {
            "batch_size": 4,
            "steps_per_epoch": 100,
            "sampling": {"group_size": 2, "max_completion_tokens": 4, "max_length": 40},
            "environment": {"class_path": "tests.doubles.TinyEnvironment"},
            "engine": {
                "class_path": "fuchsia_pl.engines.vllm_colocated.VLLMColocatedEngine",
                "init_args": engine,
            },
        },
    }
    (folder / "k.yaml").write_text(yaml.safe_dump(settings))
    return folder / "k.yaml"


def files() -> set[Path]:
    places = (Path("/dev/shm"), Path("/tmp"))
    return {entry for place in places for entry in place.iterdir() if entry.name.startswith(LEFT) or entry.is_socket()}


def has_stepped(process: subprocess.Popen, log: Path) -> bool:
    return re.search(r"^ +2( +[\d.e-]+){4}", log.read_text(), flags=re.MULTILINE) is not None  # a row of the console


def is_starting(process: subprocess.Popen, log: Path) -> bool:
    return any(b"VLLM::EngineCore" in command(pid) for pid in orphans.descendants(process.pid))


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.engine
@pytest.mark.parametrize(
    ("until", "number", "code"),
    [(has_stepped, signal.SIGKILL, -9), (is_starting, signal.SIGTERM, 143)],
    ids=["killed while it trains", "told to end while vLLM starts"],
)
def test_nothing_is_left(config, tmp_path, until: Callable[[subprocess.Popen, Path], bool], number, code):
    before, log = files(), tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(scratch.OWNER_VARIABLE, None)
    words = [sys.executable, "-u", "-m", "fuchsia_pl", "fit", "--config", str(config)]
    with log.open("w") as stream:
        process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while not until(process, log):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        family = orphans.descendants(process.pid)
        process.send_signal(number)
        assert process.wait(60) == code, log.read_text()
        deadline = time.monotonic() + END_S
        while (alive := [pid for pid in family if scratch.started_at(pid)]) or files() - before:
            assert time.monotonic() < deadline, ([command(pid) for pid in alive], files() - before)
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
