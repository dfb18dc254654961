"""Real vLLM servers, started by `fuchsia serve`, and runs that sample on them while servers die and restart.

Two servers are started once. The tests depend on their order: those that kill a server run last.
"""

import asyncio
import csv
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from fuchsia_pl.cli.launch import RUN_FOLDER_VARIABLE
from fuchsia_pl.engines.base import EngineSpec, SamplingParams
from fuchsia_pl.engines.vllm_server import VLLMServerEngine
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.types import ServedModel
from tests.integration.test_engine import Pair, logprob_gap, make_policy, perturb
from tests.machine import DTYPE, OVERLAY

pytestmark = pytest.mark.engine
FUCHSIA = str(Path(sys.executable).parent / "fuchsia")
START_S = 180.0
KEY = "a key for these servers only"
QUICKSTART = ["--config", "quickstart.yaml", *OVERLAY]
SMALL = [
    *("--data.batch_size", "2", "--data.sampling.group_size", "4", "--data.sampling.max_completion_tokens", "16"),
    *(
        "--trainer.accumulate_grad_batches",
        "2",
        "--trainer.num_sanity_val_steps",
        "0",
        "--trainer.limit_val_batches",
        "0",
    ),
]
ROWS = 8  # rollouts of such a step
STORY = "Once upon a time there was a small town by the sea. "


class Served:
    """Starts a server in its own process group, like a user in another terminal."""

    def __init__(self, root: Path, model_folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.root, self.log = root, root / f"server-{self.port}.log"
        engine = ["--data.engine.init_args.kv_cache_gb", "0.25", "--data.engine.init_args.max_num_seqs", "16"]
        self.words = [FUCHSIA, "serve", *QUICKSTART, "--model.policy.name", str(model_folder), *engine]
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            words = [*self.words, "--port", str(self.port)]
            self.process = subprocess.Popen(words, cwd=self.root, stdout=log, stderr=log)

    def wait(self) -> None:
        end = time.monotonic() + START_S
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            try:
                httpx.get(f"{self.url}/health").raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.5)
            else:
                return

    def kill(self) -> None:
        """Kills all processes of a server without notice, as if its machine were lost."""
        parts = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for part in parts:
            part.kill()
        self.process.wait(30)
        psutil.wait_procs(parts, 30)


@pytest.fixture(scope="module")
def servers(tmp_path_factory, model_folder):
    root = tmp_path_factory.mktemp("servers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)  # for servers and runs alike
        made = [Served(root, model_folder) for _ in range(2)]
        for server in made:
            server.wait()
        yield made
    for server in made:
        if server.process.poll() is None:
            server.kill()


class Run:
    """`fuchsia fit … overlays/server.yaml` in another process."""

    def __init__(self, root: Path, model_folder: Path, servers: list[Served], num_steps: int, *words: str) -> None:
        urls = [server.url for server in servers]
        sizes = ["--trainer.max_steps", str(num_steps), "--data.steps_per_epoch", str(num_steps)]
        command = [FUCHSIA, "fit", *QUICKSTART, "--config", "overlays/server.yaml", *SMALL, *sizes, *words]
        command += ["--model.policy.name", str(model_folder), "--data.engine.init_args.urls", json.dumps(urls)]
        environment = {name: value for name, value in os.environ.items() if name != RUN_FOLDER_VARIABLE}
        self.folder, self.log = root / "runs/quickstart/0", root / "console"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log, env=environment)

    def lines(self) -> list[dict]:
        return [
            json.loads(line) for file in self.folder.glob("rollouts.jsonl*") for line in file.read_text().splitlines()
        ]

    def wait_for_step(self, number: int) -> None:
        end = time.monotonic() + 120
        while len(self.lines()) < number * ROWS:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def check_all_steps(self, num_steps: int) -> None:
        """Checks that every step trained on rollouts of its own version, and that engine and trainer agreed."""
        assert self.process.wait(600) == 0, self.log.read_text()[-3000:]
        with (self.folder / "metrics.csv").open() as stream:
            rows = [row for row in csv.DictReader(stream) if row["train/loss"]]
        assert len(rows) == num_steps
        assert all(float(row["train/logprob_gap"]) < 0.15 for row in rows)
        versions = [(line["step"], line["policy_version"]) for line in self.lines()]
        assert sorted(versions) == [(step, step) for step in range(num_steps) for _ in range(ROWS)]
        assert not (self.folder / "adapters").exists()


@pytest.fixture
def fit(tmp_path, model_folder):
    """Starts a run; kills it after the test if it still runs."""
    runs = []

    def start(servers: list[Served], num_steps: int, *words: str) -> Run:
        runs.append(Run(tmp_path, model_folder, servers, num_steps, *words))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait(30)


def adapters_of(server: Served) -> list[str]:
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    cards = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()["data"]
    return [card["id"] for card in cards if card["parent"] is not None]


def test_no_path_that_a_server_lists_answers_without_the_key(servers):
    url, right = servers[0].url, {"Authorization": f"Bearer {KEY}"}
    listed = httpx.get(f"{url}/openapi.json", headers=right).json()["paths"]
    asked = [(method.upper(), path) for path, methods in listed.items() for method in methods]
    assert len(asked) > 20  # 27 in vLLM 0.32
    unlisted = [
        ("GET", path) for path in ("/docs", "/redoc", "/openapi.json", "/metrics", "/metrics/", "/no/such/path")
    ]
    with httpx.Client(base_url=url, timeout=30) as client:
        for method, path in [*asked, *unlisted]:
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                status = client.request(method, path, headers=headers).status_code
                is_open = method == "GET" and path in ("/health", "/ping")
                assert status == (200 if is_open else 401), (method, path, status)
            for other in ("HEAD", "OPTIONS"):
                if path not in ("/health", "/ping"):
                    assert client.request(other, path).status_code == 401, (other, path)
        assert client.get("/metrics", headers=right, follow_redirects=True).status_code == 200


def test_five_steps_of_the_quickstart_on_one_server(servers, fit):
    run = fit(servers[:1], 5)
    run.check_all_steps(5)
    assert adapters_of(servers[0]) == []


class ServedPair(Pair):
    """Servers and the policy that is synced to them."""

    def __init__(self, folder: Path, servers: list[Served], root: Path) -> None:
        self.chat, self.policy = Chat(folder), make_policy(folder, r=8)
        self.engine = VLLMServerEngine([server.url for server in servers], timeout_s=120)
        served = ServedModel(str(folder), DTYPE, 8, resolve=Path)
        self.engine.start(EngineSpec(served, max_length=128, seed=0, log_file=root / "engine.log"))
        # More than two blocks of 32 tokens: they are cached, and read from the cache if their keys are equal.
        self.prompts = [self.chat.render([{"role": "user", "content": STORY * 4}])]
        assert 64 < len(self.prompts[0]) < 100


def test_logprobs_follow_each_load_and_no_older_keys_and_values_are_used(servers, tmp_path, model_folder):
    pair = ServedPair(model_folder, servers[:1], tmp_path)
    seen = set()
    for version in (1, 2, 3):
        perturb(pair.policy, seed=version, scale=0.1)
        pair.sync(tmp_path / f"v{version}", version)
        for _ in range(2):  # the second finds its own keys and values
            (completion,) = pair.sample(temperature=1.0, max_tokens=24)
            assert completion.policy_version == version
            batch = pair.batch_of([completion])
            assert logprob_gap(pair.policy, batch) < 0.1
            trainer = pair.policy.evaluated_output(batch).logprobs[batch.loss_mask]
            assert (pair.scored(batch) - trainer).abs().mean() < 0.1
        seen.add(completion.logprobs)
    assert len(seen) == 3
    perturb(pair.policy, seed=2, scale=0.1)
    assert logprob_gap(pair.policy, pair.batch_of([completion])) > 0.2  # the check can fail
    pair.engine.close()


def test_one_of_two_servers_dies_and_no_step_is_lost(servers, fit):
    run = fit(servers, 6)
    run.wait_for_step(2)
    while not any(name.startswith("policy-2-") for name in adapters_of(servers[0])):
        assert run.process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # now it samples the third step, which takes some seconds
    servers[0].kill()
    run.check_all_steps(6)
    assert f"{servers[0].url} is dropped (drop 1): /v1/completions failed" in run.log.read_text()


def test_a_server_that_comes_back_has_the_newest_adapter(servers, tmp_path, model_folder):
    pair = ServedPair(model_folder, servers, tmp_path)
    pool = pair.engine._pool
    assert [server.is_healthy for server in pool.servers] == [False, True]
    servers[0].start()
    perturb(pair.policy, seed=4, scale=0.1)
    pair.sync(tmp_path / "v4", 4)
    servers[0].wait()
    end = time.monotonic() + 30
    while not pool.servers[0].is_healthy:
        assert time.monotonic() < end
        time.sleep(0.1)
    adapter = pair.engine._serving
    sampling = SamplingParams(0.0, 24, seed=0)
    completions = [
        pair.engine._thread.run(server.client.complete(adapter, pair.prompts[0], sampling, 60), 60)
        for server in pool.servers
    ]
    assert adapter.version == 4
    for completion in completions:
        assert logprob_gap(pair.policy, pair.batch_of([completion])) < 0.1
    assert completions[0].token_ids[0] == completions[1].token_ids[0]
    assert completions[0].logprobs[0] == pytest.approx(completions[1].logprobs[0], abs=0.1)
    both = asyncio.run(gather(pair, 6))
    assert {completion.policy_version for completion in both} == {4}
    pair.engine.close()


async def gather(pair: ServedPair, number: int):
    requests = [pair.engine.generate(pair.prompts[0], SamplingParams(1.0, 4, seed=seed)) for seed in range(number)]
    return await asyncio.gather(*requests)


def test_when_both_die_all_ranks_end_within_their_bound_and_say_what_to_do(servers, fit):
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accumulate_grad_batches", "1"]
    run = fit(servers, 100, *ranks, "--data.engine.init_args.recovery_timeout_s", "5")
    run.wait_for_step(1)
    ranks = psutil.Process(run.process.pid).children(recursive=True)
    for server in servers:
        server.kill()
    begin = time.monotonic()
    assert run.process.wait(60) != 0
    assert not psutil.wait_procs(ranks, 30)[1]
    assert time.monotonic() - begin < 40
    printed = run.log.read_text()
    for words in (
        "no server was left for 5 s",
        *(server.url for server in servers),
        "Start one with `fuchsia serve`",
    ):
        assert words in printed
