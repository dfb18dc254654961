"""A stock vLLM server as the teacher of the real model."""

import csv
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from fuchsia_pl.cli.launch import RUN_FOLDER_VARIABLE
from tests.machine import DTYPE, OVERLAY

pytestmark = pytest.mark.engine
FUCHSIA = str(Path(sys.executable).parent / "fuchsia")
START_S = 180.0
KEY = "a key of the teacher"


def fit(root: Path, *words: str) -> Path:
    """The folder of a run of the quickstart."""
    environment = {name: value for name, value in os.environ.items() if name != RUN_FOLDER_VARIABLE}
    command = [FUCHSIA, "fit", "--config", "quickstart.yaml", *OVERLAY, *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1500, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root / "runs" / "quickstart" / "0"


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row[name]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, model_folder):
    """The address of a stock vLLM server with the policy's base model, without adapters."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("teacher") / "server.log"
    words = ["--model", str(model_folder), "--served-model-name", "the-teacher", "--port", str(port)]
    words += ["--dtype", DTYPE, "--max-model-len", "128", "--max-num-seqs", "16", "--enforce-eager"]
    environment = {**os.environ, "VLLM_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as output, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", *words]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        end, url = time.monotonic() + START_S, f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield url
        process.terminate()
        process.wait(60)


def test_a_server_with_the_base_model_agrees_with_the_policy_before_it_is_trained(tmp_path, teacher):
    words = ["--data.teacher.name", "the-teacher", "--data.teacher.url", teacher, "--model.loss.advantage", "teacher"]
    words += ["--data.batch_size", "2", "--data.sampling.group_size", "4", "--trainer.max_steps", "2"]
    words += ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]
    run = fit(tmp_path, *words)
    first, second = column(run, "teacher/kl")
    # Two implementations of one model: their logprobs differ by rounding, about 0.04 in bfloat16.
    assert abs(first) < 0.05
    assert column(run, "teacher/advantage")[0] < 0.1
    assert second == pytest.approx(first, abs=0.5)


def test_a_name_that_the_server_does_not_list_is_refused_before_the_policys_engine_starts(tmp_path, teacher):
    words = ["--data.teacher.name", "another", "--data.teacher.url", teacher, "--model.loss.advantage", "teacher"]
    command = [FUCHSIA, "fit", "--config", "quickstart.yaml", *OVERLAY, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "has no model 'another': set its name to one of ['the-teacher']" in done.stderr
