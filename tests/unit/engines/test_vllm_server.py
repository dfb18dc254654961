"""`VLLMServerEngine` against doubles of vLLM's server: who is asked, what is retried, what ends the run and how fast."""

import asyncio
import json
import logging
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fuchsia_pl.engines.base import VERSION_FILE, EngineError, EngineSpec, SamplingParams
from fuchsia_pl.engines.vllm_server import VLLMServerEngine
from fuchsia_pl.types import ConfigError, ServedModel
from tests.server_double import FakeServer

SAMPLING = SamplingParams(1.0, max_tokens=4, seed=7, stop=("</a>",), stop_token_ids=(2,))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr("fuchsia_pl.engines.vllm_pool.POLL_S", 0.05)
    monkeypatch.setattr("fuchsia_pl.engines.vllm_pool.BACKOFF_S", 0.01)
    monkeypatch.setattr("fuchsia_pl.engines.vllm_http.QUICK_TIMEOUT_S", 0.5)


@pytest.fixture
def servers():
    made = [FakeServer(), FakeServer()]
    yield made
    for server in made:
        server.kill()


def make_spec(root: Path, **changes) -> EngineSpec:
    model = ServedModel("/models/tiny", "float32", changes.pop("lora_rank", 4), Path)
    return EngineSpec(model, **{"max_length": 64, "seed": 0, "log_file": root / "run" / "engine.log", **changes})


@pytest.fixture
def start(tmp_path):
    """Starts an engine on some servers; every engine is closed at the end."""
    engines = []

    def make(servers, spec=None, **settings) -> VLLMServerEngine:
        settings = {"timeout_s": 5.0, "recovery_timeout_s": 2.0, **settings}
        engine = VLLMServerEngine([server.url for server in servers], **settings)
        engines.append(engine)
        engine.start(spec or make_spec(tmp_path))
        wait_until(lambda: sum(s.is_healthy for s in engine._pool.servers) == len(servers))
        return engine

    yield make
    for engine in engines:
        engine.close()


def wait_until(condition, timeout_s: float = 5.0) -> None:
    end = time.perf_counter() + timeout_s
    while not condition():
        assert time.perf_counter() < end, "waited in vain"
        time.sleep(0.01)


def load(engine, root: Path, version: int, weight: float = -0.25) -> None:
    """Gives the engine an adapter whose weights add up to `weight`, which the double returns as every logprob."""
    folder = root / f"adapter-{version}-{weight}"
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.tensor([weight])}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4}))
    (folder / VERSION_FILE).write_text(str(version))
    asyncio.run(engine.load_adapter(folder, version))


def ask(engine, number: int = 1, sampling=SAMPLING):
    async def gather():
        return await asyncio.gather(*(engine.generate([1, 10 + n], sampling) for n in range(number)))

    return asyncio.run(gather())


def test_the_logprobs_follow_each_load_though_the_prompt_is_cached(servers, start, tmp_path):
    engine = start(servers[:1])
    assert engine.policy_version == -1
    for version, weight in enumerate([-0.25, -0.5, -0.75]):
        load(engine, tmp_path, version, weight)
        (completion,) = ask(engine)
        assert (completion.token_ids, completion.logprobs) == ((5, 2), (weight, weight))
        assert (completion.policy_version, engine.policy_version) == (version, version)


def test_the_double_would_show_keys_and_values_of_older_weights(servers, start, tmp_path):
    """An adapter that changes under one name is answered from the cache: what the names are there to prevent."""
    engine = start(servers[:1])
    load(engine, tmp_path, 0, -0.25)
    ask(engine)
    (folder,) = servers[0].adapters.values()
    save_file({"a": torch.tensor([-0.5])}, f"{folder}/adapter_model.safetensors")
    assert ask(engine)[0].logprobs == (-0.25, -0.25)


def test_every_sampling_value_is_said(servers, start, tmp_path):
    engine = start(servers[:1])
    load(engine, tmp_path, 3)
    ask(engine)
    (name,) = servers[0].adapters
    assert name.startswith("policy-3-")
    ours = {"temperature": 1.0, "max_tokens": 4, "seed": 7, "stop": ["</a>"], "stop_token_ids": [2]}
    support = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_tokens": 0, "ignore_eos": False}
    penalties = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    text = {"skip_special_tokens": True, "include_stop_str_in_output": False, "echo": False, "stream": False}
    wanted = {"model": name, "prompt": [1, 10], "n": 1, "logprobs": 0, "return_token_ids": True}
    assert servers[0].bodies == [ours | support | penalties | text | wanted]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logprobs": {"token_logprobs": [-0.1]}}, "1 logprobs for 2 sampled ids"),
        ({"logprobs": None}, "0 logprobs for 2 sampled ids"),
        ({"logprobs": {"token_logprobs": [-0.1, None]}}, "logprobs that are no numbers"),
        ({"logprobs": {"token_logprobs": [-0.1, -9999.0]}}, "logprobs that are no numbers"),
        ({"token_ids": None}, "no token ids"),
        ({"finish_reason": "abort"}, "ended a completion with 'abort'"),
    ],
)
def test_an_answer_that_must_not_train_is_an_error(servers, start, tmp_path, change, words):
    engine = start(servers[:1])
    load(engine, tmp_path, 0)
    servers[0].change = change
    with pytest.raises(EngineError, match=words):
        ask(engine)


def test_an_answer_of_another_model_is_an_error(servers, start, tmp_path):
    engine = start(servers[:1])
    load(engine, tmp_path, 0)
    servers[0].answers = {"model": "policy-9-0123456789ab"}
    with pytest.raises(EngineError, match=r"was asked for 'policy-0-.*', and 'policy-9-0123456789ab' answered"):
        ask(engine)


def test_what_ended_a_completion_is_kept(servers, start, tmp_path):
    engine = start(servers[:1])
    load(engine, tmp_path, 0)
    servers[0].change = {"stop_reason": "</a>"}
    assert ask(engine)[0].stop_reason == "</a>"


def test_requests_go_to_the_server_with_the_fewest_in_flight(servers, start, tmp_path):
    engine = start(servers)
    load(engine, tmp_path, 0)
    ask(engine, 12)
    assert {len(server.bodies) for server in servers} == {6}


@pytest.mark.parametrize("mode", ["cut", 500, 503, "hang"])
def test_a_server_that_fails_is_dropped_and_its_requests_run_on_another(servers, start, tmp_path, mode, caplog):
    engine = start(servers, timeout_s=0.5)
    load(engine, tmp_path, 0)
    servers[0].mode = servers[0].health = mode
    with caplog.at_level(logging.WARNING):
        assert len(ask(engine, 8)) == 8
    assert engine.num_drops >= 1
    assert any(f"{servers[0].url} is dropped" in message for message in caplog.messages)
    servers[1].bodies.clear()
    before = len(servers[0].bodies)
    wait_until(lambda: not engine._pool.servers[0].is_healthy)
    ask(engine, 4)
    assert (len(servers[0].bodies), len(servers[1].bodies)) == (before, 4)


def test_a_server_whose_health_fails_gives_up_what_is_in_flight_there(servers, start, tmp_path):
    engine = start(servers, timeout_s=30)
    load(engine, tmp_path, 0)
    servers[0].mode = servers[0].health = "hang"
    begin = time.perf_counter()
    assert len(ask(engine, 4)) == 4
    assert time.perf_counter() - begin < 5


def test_a_killed_server_comes_back_with_the_newest_adapter(servers, start, tmp_path):
    engine = start(servers)
    load(engine, tmp_path, 0, -0.25)
    servers[0].kill()
    wait_until(lambda: engine.num_drops == 1)
    load(engine, tmp_path, 1, -0.5)
    assert {completion.logprobs for completion in ask(engine, 4)} == {(-0.5, -0.5)}
    servers[0].restart()
    wait_until(lambda: engine._pool.servers[0].is_healthy)
    assert [name.split("-")[1] for name in servers[0].adapters] == ["1"]
    assert {(c.logprobs, c.policy_version) for c in ask(engine, 8)} == {((-0.5, -0.5), 1)}
    assert len(servers[0].bodies) == 4


def test_a_server_that_restarted_unnoticed_is_given_its_adapter_again(servers, start, tmp_path):
    engine = start(servers[:1])
    load(engine, tmp_path, 0)
    servers[0].adapters.clear()
    assert ask(engine)[0].policy_version == 0
    assert len(servers[0].loads) == 2


def test_a_request_that_is_refused_is_not_asked_again(servers, start, tmp_path):
    engine = start(servers)
    load(engine, tmp_path, 0)
    for server in servers:
        server.mode = 400
    with pytest.raises(EngineError, match=r"refused a completion: 400 .*as it was told to"):
        ask(engine)
    assert sum(len(server.bodies) for server in servers) == 1
    assert engine.num_drops == 0


def test_a_request_that_breaks_every_server_ends(servers, start, tmp_path):
    engine = start(servers)
    load(engine, tmp_path, 0)
    for server in servers:
        server.mode = 500
    with pytest.raises(EngineError, match=r"(?s)a completion failed on 5 vLLM servers in turn.*answered 500"):
        ask(engine)
    assert sum(len(server.bodies) for server in servers) == 5


@pytest.mark.parametrize("how", ["kill", "hang"])
def test_when_no_server_is_left_the_run_ends_within_its_bound_and_says_what_to_do(servers, start, tmp_path, how):
    engine = start(servers, recovery_timeout_s=0.5)
    load(engine, tmp_path, 0)
    for server in servers:
        server.mode = server.health = "hang"
        if how == "kill":
            server.kill()
    begin = time.perf_counter()
    with pytest.raises(EngineError, match=r"(?s)no vLLM server was left for 0\.5 s") as caught:
        ask(engine, 3)
    assert time.perf_counter() - begin < 4
    for words in (*(server.url for server in servers), "fuchsia serve", "data.engine.init_args.urls"):
        assert words in str(caught.value)
    with pytest.raises(EngineError, match="no vLLM server was left"):
        load(engine, tmp_path, 1)


def test_servers_that_never_answer_completions_are_an_error_within_a_bound(servers, start, tmp_path):
    """Their health is well, so they are taken back again and again."""
    engine = start(servers, timeout_s=0.3, recovery_timeout_s=0.3)
    load(engine, tmp_path, 0)
    for server in servers:
        server.mode = "hang"
    begin = time.perf_counter()
    with pytest.raises(EngineError, match=r"a completion (took longer than 0\.9 s|failed on 5)"):
        ask(engine)
    assert time.perf_counter() - begin < 3


def test_two_adapters_are_kept_and_none_after_the_run(servers, start, tmp_path):
    engine = start(servers)
    for version in range(4):
        load(engine, tmp_path, version)
    for server in servers:
        assert [name.split("-")[1] for name in server.adapters] == ["2", "3"]
    assert sorted(folder.name.split("-")[1] for folder in (tmp_path / "run/adapters").iterdir()) == ["2", "3"]
    engine.close()
    assert not any(server.adapters for server in servers)
    assert not (tmp_path / "run/adapters").exists()


def test_with_several_ranks_each_loads_what_the_others_have_and_leaves_it(servers, start, tmp_path):
    ranks = [start(servers[:1], make_spec(tmp_path, num_ranks=2)) for _ in range(2)]
    for rank in ranks:
        load(rank, tmp_path, 0)
    assert len(servers[0].loads) == 1
    ranks[0].close()
    assert ask(ranks[1])[0].policy_version == 0


def test_an_adapter_of_an_earlier_run_is_loaded_anew(servers, start, tmp_path):
    engine = start(servers[:1])
    load(engine, tmp_path, 0)
    (name,) = servers[0].adapters
    servers[0].adapters[name] = "/runs/earlier"
    engine._serving = None
    load(engine, tmp_path, 0)
    assert servers[0].adapters[name] == str(tmp_path / "run/adapters" / name)


def test_an_adapter_of_another_version_is_refused(servers, start, tmp_path):
    engine = start(servers[:1])
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / VERSION_FILE).write_text("3")
    with pytest.raises(EngineError, match="holds version 3, version 4 was asked for"):
        asyncio.run(engine.load_adapter(folder, 4))


def test_a_folder_that_servers_do_not_see_is_told(servers, start, tmp_path, monkeypatch):
    engine = start(servers[:1])
    monkeypatch.setattr(FakeServer, "_load", lambda self, name, path: (404, {"message": f"{name}: No adapter found"}))
    with pytest.raises(
        EngineError, match=r"did not load the adapter in .*adapter_folder must be a folder that trainer"
    ):
        load(engine, tmp_path, 0)


def test_the_adapter_folder_is_a_setting(servers, start, tmp_path):
    engine = start(servers[:1], adapter_folder=str(tmp_path / "shared"))
    load(engine, tmp_path, 0)
    (path,) = servers[0].adapters.values()
    assert Path(path).parent == tmp_path / "shared"


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"max_model_len": 63}, "was started for 63 tokens, and data.sampling.max_length is 64"),
        ({"model": "Qwen/Qwen2.5-3B"}, "serves Qwen/Qwen2.5-3B, and model.policy.name is /models/tiny"),
        ({"api_key": "secret"}, "refused the API key"),
    ],
)
def test_a_server_that_cannot_serve_the_run_is_refused_at_once(start, server, words):
    fake = FakeServer(**server)
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match=words):
        start([fake], timeout_s=30)
    assert time.perf_counter() - begin < 5
    fake.kill()


@pytest.mark.parametrize("where", ["setting", "environment"])
def test_the_api_key_is_a_setting_or_a_variable(start, tmp_path, monkeypatch, where):
    fake = FakeServer(api_key="secret")
    if where == "environment":
        monkeypatch.setenv("VLLM_API_KEY", "secret")
    engine = start([fake], api_key="secret" if where == "setting" else None)
    load(engine, tmp_path, 0)
    assert ask(engine)
    fake.kill()


def test_a_start_without_servers_ends_within_its_bound_and_says_what_to_do(start, servers, caplog):
    servers[0].kill()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(EngineError, match=r"(?s)was ready within 0\.3 s.*fuchsia serve"),
    ):
        start(servers[:1], timeout_s=0.3)
    assert [message for message in caplog.messages if f"{servers[0].url} cannot be asked" in message]


def test_a_server_that_starts_later_joins(servers, start, tmp_path):
    servers[1].kill()
    engine = VLLMServerEngine([server.url for server in servers], timeout_s=5)
    engine.start(make_spec(tmp_path))
    load(engine, tmp_path, 0)
    servers[1].restart()
    wait_until(lambda: engine._pool.servers[1].is_healthy)
    ask(engine, 4)
    assert len(servers[1].bodies) == 2
    engine.close()


def test_requests_cannot_go_on_with_new_weights_on_a_server(tmp_path):
    with pytest.raises(ConfigError, match='in_flight is "continue", and a request to a server ends with the weights'):
        VLLMServerEngine(["http://x:1"]).start(make_spec(tmp_path, loads_in_flight=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"urls": []}, "one or more different servers"),
        ({"urls": ["http://a:1", "http://a:1/v1/"]}, "one or more different servers"),
        ({"urls": ["a:1"]}, "must be like http://host:8000, got 'a:1'"),
        ({"urls": ["http://a:1"], "timeout_s": 0}, "timeout_s must be above 0, got 0"),
        ({"urls": ["http://a:1"], "recovery_timeout_s": -1}, "recovery_timeout_s must be above 0, got -1"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        VLLMServerEngine(**settings)


def test_an_engine_that_was_not_started_or_has_no_adapter_says_so(servers, start):
    with pytest.raises(EngineError, match="does not run: call start first"):
        ask(VLLMServerEngine(["http://x:1"]))
    with pytest.raises(EngineError, match="before the first weights were loaded"):
        ask(start(servers[:1]))
