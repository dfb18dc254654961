"""`VLLMServerEngine` against doubles of vLLM's server: requests, loads and refusals."""

import asyncio
import logging
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fuchsia_pl.engines.base import VERSION_FILE, EngineError
from fuchsia_pl.engines.published import named
from fuchsia_pl.engines.vllm_server import VLLMServerEngine
from fuchsia_pl.types import ConfigError
from tests.server_double import FakeServer, ask, load, make_spec, wait_until


def test_the_logprobs_follow_each_load_though_the_prompt_is_cached(servers, start, tmp_path):
    engine = start(servers[:1])
    assert engine.policy_version == -1
    for version, weight in enumerate([-0.25, -0.5, -0.75]):
        load(engine, tmp_path, version, weight)
        (completion,) = ask(engine)
        assert (completion.token_ids, completion.logprobs) == ((5, 2), (weight, weight))
        assert (completion.policy_version, engine.policy_version) == (version, version)


def test_the_double_would_show_keys_and_values_of_older_weights(servers, start, tmp_path):
    """If an adapter changes under one name, the cache answers for the old one; unique names prevent this."""
    engine = start(servers[:1])
    load(engine, tmp_path, 0, -0.25)
    ask(engine)
    (folder,) = servers[0].adapters.values()
    save_file({"a": torch.tensor([-0.5])}, f"{folder}/adapter_model.safetensors")
    assert ask(engine)[0].logprobs == (-0.25, -0.25)


def test_every_sampling_parameter_is_sent(servers, start, tmp_path):
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


def test_a_score_has_a_logprob_for_each_id_after_the_first_and_follows_each_load(servers, start, tmp_path):
    engine = start(servers[:1])
    for version, weight in enumerate([-0.25, -0.5]):
        load(engine, tmp_path, version, weight)
        assert asyncio.run(engine.score([4, 5, 6, 7])) == (weight,) * 3
    assert asyncio.run(engine.score([4, 5])) == (-0.5,)
    assert asyncio.run(engine.score([4])) == ()
    assert len(servers[0].bodies) == 3


def test_a_scoring_request_keeps_the_last_id_out_of_the_prompt(servers, start, tmp_path):
    engine = start(servers[:1])
    load(engine, tmp_path, 3)
    asyncio.run(engine.score([4, 5, 6]))
    (body,) = servers[0].bodies
    wanted = {"prompt": [4, 5], "logprob_token_ids": [6], "prompt_logprobs": 0, "max_tokens": 1, "temperature": 1.0}
    assert body.items() >= (wanted | {"model": next(iter(servers[0].adapters)), "logprobs": 1}).items()
    assert body["return_tokens_as_token_ids"] is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_logprobs": None}, "does not have the expected shape"),
        ({"prompt_logprobs": [None, {"9": {"logprob": -0.1}}]}, "does not have the expected shape"),
        ({"prompt_logprobs": [None, {"5": {"logprob": -9999.0}}]}, "logprobs for given ids that are not finite"),
        ({"logprobs": {"top_logprobs": [{"token_id:3": -0.1}]}}, "does not have the expected shape"),
        ({"finish_reason": "abort"}, "ended a request with 'abort'"),
    ],
)
def test_an_invalid_answer_to_a_scoring_request_is_an_error(servers, start, tmp_path, change, words):
    engine = start(servers[:1])
    load(engine, tmp_path, 0)
    servers[0].change = change
    with pytest.raises(EngineError, match=words):
        asyncio.run(engine.score([4, 5, 6]))


def test_a_row_is_scored_again_if_newer_weights_were_loaded_meanwhile(servers, start, tmp_path, monkeypatch):
    engine = start(servers[:1])
    load(engine, tmp_path, 0, -0.25)
    score, publish = engine._pool.score, engine._publisher.publish

    async def overtaken(weights, token_ids):
        logprobs = await score(weights, token_ids)
        if weights.version == 0:
            await engine._load(*newer)
        return logprobs

    monkeypatch.setattr(engine._pool, "score", overtaken)
    newer = []
    monkeypatch.setattr(engine._publisher, "publish", lambda *given: newer.extend(given) or publish(*given))
    load(engine, tmp_path, 1, -0.5)
    engine._serving = named(tmp_path / "adapter-0--0.25", 0, tmp_path / "run/adapters")
    assert asyncio.run(engine.score([4, 5, 6])) == (-0.5, -0.5)
    assert engine.policy_version == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logprobs": {"token_logprobs": [-0.1]}}, "1 logprobs for 2 sampled ids"),
        ({"logprobs": None}, "0 logprobs for 2 sampled ids"),
        ({"logprobs": {"token_logprobs": [-0.1, None]}}, "logprobs for sampled ids that are not finite"),
        ({"logprobs": {"token_logprobs": [-0.1, -9999.0]}}, "logprobs for sampled ids that are not finite"),
        ({"token_ids": None}, "no token ids"),
        ({"finish_reason": "abort"}, "ended a request with 'abort'"),
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
    with pytest.raises(EngineError, match=r"request to vLLM named 'policy-0-.*', and 'policy-9-0123456789ab' answered"):
        ask(engine)


def test_what_ended_a_completion_is_kept(servers, start, tmp_path):
    engine = start(servers[:1])
    load(engine, tmp_path, 0)
    servers[0].change = {"stop_reason": "</a>"}
    assert ask(engine)[0].stop_reason == "</a>"


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


def test_an_adapter_of_an_earlier_run_is_no_obstacle(servers, start, tmp_path):
    """Runs of several ranks leave adapters on the server; a run with the same seed begins with the same weights."""
    for run in ("first", "second"):
        spec = make_spec(tmp_path, num_ranks=2, log_file=tmp_path / run / "engine.log")
        ranks = [start(servers[:1], spec) for _ in range(2)]
        for rank in ranks:
            load(rank, tmp_path, 0)
        for rank in ranks:
            rank.close()
        shutil.rmtree(tmp_path / run)
    assert len(servers[0].loads) == len(servers[0].adapters) == 2
    assert not servers[0].unloads


def test_an_adapter_of_another_version_is_refused(servers, start, tmp_path):
    engine = start(servers[:1])
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / VERSION_FILE).write_text("3")
    with pytest.raises(EngineError, match="contains version 3, and version 4 is required"):
        asyncio.run(engine.load_weights(folder, 4))


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
    assert time.perf_counter() - begin < 15
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
    assert [message for message in caplog.messages if f"{servers[0].url} cannot be used" in message]


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
    for request in (ask, lambda engine: asyncio.run(engine.score([4, 5]))):
        with pytest.raises(EngineError, match="before the first weights were loaded"):
            request(start(servers[:1]))
