"""Whole weights for servers: sender, valid answers, failures and their duration. Without GPUs, a double replaces NCCL."""

import asyncio
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fuchsia_pl.engines import vllm_transfer
from fuchsia_pl.engines.base import VERSION_FILE, EngineError, EngineSpec, SamplingParams
from fuchsia_pl.engines.vllm_server import VLLMServerEngine
from fuchsia_pl.engines.vllm_transfer import ControlPlane, FolderSource, WeightSender, own_address
from fuchsia_pl.types import ConfigError, ServedModel
from tests.server_double import FakeServer


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("fuchsia_pl.engines.pool.POLL_S", 0.05)
    monkeypatch.setattr("fuchsia_pl.engines.pool.BACKOFF_S", 0.01)
    monkeypatch.setattr("fuchsia_pl.engines.vllm_transfer.POLL_S", 0.02)
    monkeypatch.setattr("fuchsia_pl.engines.vllm_transfer.gpu_uuid", lambda index: f"GPU-{index}")


@pytest.fixture
def server():
    fake = FakeServer()
    fake.takes_weights = True
    yield fake
    fake.kill()


@pytest.fixture
def sent(monkeypatch, server):
    """The transfers, as (folder, number of workers, GPU)."""
    calls = []

    def send(url, api_key, folder, num_workers, device_index, timeout_s) -> None:
        assert (url, api_key) == (server.url, server.api_key)
        assert (url, server.weight_version, server.controls[-1]) == (server.url, "changing", "POST /pause?mode=wait")
        calls.append((folder, num_workers, device_index))
        server.weights = folder

    monkeypatch.setattr("fuchsia_pl.engines.vllm_transfer.send_over_nccl", send)
    return calls


@pytest.fixture
def start(tmp_path, server):
    engines = []

    def make(rank: int = 0, device_index: int | None = 3, timeout_s: float = 5.0) -> VLLMServerEngine:
        model = ServedModel("/models/tiny", "float32", 0, Path)
        log_file = tmp_path / "run/engine.log"
        spec = EngineSpec(model, 64, 0, log_file, num_ranks=2, rank=rank, device_index=device_index)
        engine = VLLMServerEngine([server.url], timeout_s=timeout_s, recovery_timeout_s=2.0)
        engine.start(spec)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def write(root: Path, version: int, weight: float) -> Path:
    """A whole model with weights that sum to `weight`, which the double returns as every logprob."""
    folder = root / f"weights-{version}"
    folder.mkdir()
    save_file({"a.weight": torch.tensor([weight, 0.0])}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / VERSION_FILE).write_text(str(version))
    return folder


def load(engine, root: Path, version: int, weight: float) -> None:
    asyncio.run(engine.load_weights(write(root, version, weight), version))


def ask(engine):
    return asyncio.run(engine.generate([1, 10], SamplingParams(1.0, max_tokens=4, seed=7)))


def test_weights_are_sent_and_answered_with(server, sent, start, tmp_path):
    engine = start()
    for version, weight in enumerate([-0.25, -0.5]):
        load(engine, tmp_path, version, weight)
        completion = ask(engine)  # the same prompt: keys and values of older weights are gone
        assert (completion.policy_version, completion.logprobs) == (version, (weight, weight))
        assert asyncio.run(engine.score([1, 10, 11])) == (weight, weight)
    assert [call[1:] for call in sent] == [(2, 3), (2, 3)]
    assert server.controls[-3:] == ["POST /reset_prefix_cache", "POST /update_weight_version", "POST /resume"]
    assert {body["model"] for body in server.bodies} == {server.model}
    assert [folder.name for folder in (tmp_path / "run/adapters").iterdir()] == [server.weight_version]


def test_a_server_that_lost_them_gets_them_again_before_it_is_believed(server, sent, start, tmp_path):
    engine = start()
    load(engine, tmp_path, 0, -0.25)
    save_file({"a": torch.tensor([-9.0])}, tmp_path / "model.safetensors")
    server.weight_version, server.weights, server.cache = "default", tmp_path, {}
    assert ask(engine).logprobs == (-0.25, -0.25)
    assert len(sent) == 2
    assert len(server.bodies) == 1  # it got no request while it had other weights


def test_an_answer_during_which_the_weights_changed_does_not_count(server, sent, start, tmp_path, monkeypatch):
    engine = start()
    load(engine, tmp_path, 0, -0.25)
    save_file({"a": torch.tensor([-9.0])}, tmp_path / "model.safetensors")
    completion = FakeServer._completion

    def started_anew_meanwhile(self, body):
        if len(self.bodies) == 1:
            self.weight_version, self.weights, self.cache = "default", tmp_path, {}
        return completion(self, body)

    monkeypatch.setattr(FakeServer, "_completion", started_anew_meanwhile)
    assert ask(engine).logprobs == (-0.25, -0.25)
    assert (len(sent), len(server.bodies)) == (2, 2)


def test_only_the_first_rank_sends_and_the_others_wait_for_it(server, sent, start, tmp_path):
    first, second = start(rank=0), start(rank=1)
    folder = write(tmp_path, 0, -0.25)
    waiting = threading.Thread(target=lambda: asyncio.run(second.load_weights(folder, 0)))
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive()
    assert second.policy_version == -1
    assert not sent
    asyncio.run(first.load_weights(folder, 0))
    waiting.join(30)
    assert (second.policy_version, len(sent)) == (0, 1)
    assert ask(second).logprobs == (-0.25, -0.25)


def test_a_wait_for_another_rank_is_bounded(start, tmp_path):
    begin = time.perf_counter()
    with pytest.raises(EngineError, match=r"did not have policy-0-\w+ within 0\.3 s"):
        load(start(rank=1, timeout_s=0.3), tmp_path, 0, -0.25)
    assert time.perf_counter() - begin < 10


def test_a_transfer_that_never_ends_is_an_error_and_none_is_begun_beside_it(start, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr("fuchsia_pl.engines.vllm_transfer.send_over_nccl", lambda *_: begun.append(1) or time.sleep(60))
    begin, engine = time.perf_counter(), start(timeout_s=0.3)
    for version in (0, 1):
        with pytest.raises(EngineError, match=rf"did not have policy-{version}-\w+ within 0\.3 s: resume the run"):
            load(engine, tmp_path, version, -0.25)
    assert len(begun) == 1
    assert time.perf_counter() - begin < 20


def test_a_transfer_that_its_caller_gave_up_is_waited_for(tmp_path, monkeypatch):
    """After one failed health check during a transfer, the transfer to the next server starts when the first has ended."""
    events = []

    def slow(url, *_):
        events.append(f"begin {url}")
        time.sleep(0.4)
        events.append(f"end {url}")

    monkeypatch.setattr(vllm_transfer, "send_over_nccl", slow)

    async def given_up_and_asked_again():
        sender = WeightSender(2, None)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sender.send("one", tmp_path, 2, 5), 0.1)
        await sender.send("two", tmp_path, 2, 5)

    asyncio.run(given_up_and_asked_again())
    assert events == ["begin one", "end one", "begin two", "end two"]


def test_a_prefix_cache_that_stays_is_an_error(server, sent, start, tmp_path):
    server.resets = False
    with pytest.raises(EngineError, match="did not reset its prefix cache"):
        load(start(), tmp_path, 0, -0.25)
    assert server.weight_version == "changing"


def test_requests_in_flight_are_answered_by_the_weights_that_they_asked_for(server, sent, start, tmp_path):
    """Several requests detect at the same time that the server has lost the weights."""
    engine = start()
    load(engine, tmp_path, 0, -0.25)
    save_file({"a": torch.tensor([-9.0])}, tmp_path / "model.safetensors")
    server.weight_version, server.weights, server.cache = "default", tmp_path, {}

    async def gather():
        params = SamplingParams(1.0, max_tokens=4, seed=7)
        return await asyncio.gather(*(engine.generate([1, 10 + n], params) for n in range(8)))

    assert {completion.logprobs for completion in asyncio.run(gather())} == {(-0.25, -0.25)}
    assert len(sent) == 2


def test_a_transfer_that_fails_ends_the_run_and_says_what_it_needs(start, tmp_path, monkeypatch, server):
    def fail(*_) -> None:
        raise RuntimeError("NCCL error 5")

    monkeypatch.setattr("fuchsia_pl.engines.vllm_transfer.send_over_nccl", fail)
    with pytest.raises(EngineError, match=r"NCCL error 5.*the server needs a GPU"):
        load(start(), tmp_path, 0, -0.25)
    assert server.weight_version == "changing"


def test_a_server_that_takes_no_weights_is_told(start, server):
    server.takes_weights = False
    with pytest.raises(EngineError, match=r"/collective_rpc with 404: start it with `fuchsia serve`"):
        start(timeout_s=0.5)


def test_a_server_on_the_gpu_that_sends_is_refused_at_the_start(start, server):
    """NCCL has no group with one GPU twice. Another rank sends nothing, so it may share its GPU."""
    server.gpus = ["GPU-a", "GPU-3"]
    with pytest.raises(
        ConfigError, match=r"is on the trainer's GPU, .* start it with another CUDA_VISIBLE_DEVICES"
    ) as caught:
        start(device_index=3)
    assert "\n" not in str(caught.value)
    assert start(rank=1, device_index=3).policy_version == -1
    assert start(device_index=2).policy_version == -1


def test_a_trainer_on_a_cpu_is_refused(start):
    with pytest.raises(ConfigError, match=r"trainer is on a CPU: .* weight transfer, which goes from GPU to GPU"):
        start(device_index=None)


def test_what_is_announced_is_what_is_sent(tmp_path):
    """By the check of vLLM's own sender."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    folder = write(tmp_path, 0, -0.25)
    source = FolderSource(folder, torch.device("cpu"))
    for _ in range(2):  # every sync is a separate pass
        sent = list(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
        assert [(name, tensor.tolist()) for name, tensor in sent] == [("a.weight", [-0.25, 0.0])]
    assert NCCLTrainerInitInfo("127.0.0.1", 5, world_size=3, rank=0).is_sender


def test_vllm_has_the_endpoints():
    from vllm.entrypoints.rl.online.api_router import router
    from vllm.entrypoints.serve.dev.cache.api_router import router as cache_router
    from vllm.entrypoints.serve.dev.rpc.api_router import router as rpc_router

    routes = [*router.routes, *cache_router.routes, *rpc_router.routes]
    asked = {f"{method} {route.path}" for route in routes for method in route.methods}
    gets = {f"GET /{name}" for name in ("weight_info", "get_world_size")}
    posts = {
        f"POST /{name}" for name in ("update_weight_version", "pause", "resume", "reset_prefix_cache", "collective_rpc")
    }
    steps = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
    posts |= {f"POST /{name}" for name in (*steps, "shutdown_weight_transfer_engine")}
    assert asked >= gets | posts


def test_the_control_plane_asks_what_vllms_client_asks(monkeypatch):
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

    asked: list[list] = [[], []]
    for kind, calls in zip((ControlPlane, HTTPVLLMWeightSyncClient), asked, strict=True):
        monkeypatch.setattr(
            kind, "_post", lambda self, path, json=None, calls=calls: calls.append((path.strip("/"), json))
        )
        client = kind("http://127.0.0.1:1", *([None] if kind is ControlPlane else []), 1.0)
        client.init_weight_transfer_engine({"rank_offset": 1})
        client.start_weight_update()
        client.update_weights({"names": ["a"]})
        client.finish_weight_update("policy-1")
        client.shutdown_weight_transfer_engine()
    ours, theirs = asked
    assert [(path, body or None) for path, body in ours] == theirs


def test_what_the_server_says_is_told(server):
    server.takes_weights = False
    with pytest.raises(RuntimeError, match=r"/start_weight_update answered 404 .*Not Found"):
        ControlPlane(server.url, None, 5.0).start_weight_update()


def test_the_key_is_brought_to_every_path():
    guarded = FakeServer(api_key="secret")
    guarded.takes_weights = False
    try:
        with pytest.raises(RuntimeError, match="answered 401"):
            ControlPlane(guarded.url, "wrong", 5.0).start_weight_update()
        with pytest.raises(RuntimeError, match="answered 404"):
            ControlPlane(guarded.url, "secret", 5.0).start_weight_update()
    finally:
        guarded.kill()


def test_the_own_address_is_the_one_that_the_server_sees(server):
    address, port = own_address(server.url)
    assert address == "127.0.0.1"
    with socket.socket() as listener:
        listener.bind((address, port))  # it is free
