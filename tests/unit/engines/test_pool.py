"""Several servers as one: which server gets a request, which is dropped and readmitted, and where its requests run then."""

import asyncio
import logging
import resource
import time

import pytest

from fuchsia_pl.engines.base import EngineError
from tests.server_double import SAMPLING, ask, load, wait_until


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
    assert engine._pool.num_drops >= 1
    assert any(f"{servers[0].url} is dropped" in message for message in caplog.messages)
    servers[1].bodies.clear()
    before = len(servers[0].bodies)
    wait_until(lambda: not engine._pool.servers[0].is_healthy)
    ask(engine, 4)
    assert (len(servers[0].bodies), len(servers[1].bodies)) == (before, 4)


def test_a_score_runs_on_another_server_if_one_fails(servers, start, tmp_path):
    engine = start(servers)
    load(engine, tmp_path, 0)
    servers[0].mode = 500

    async def gather():
        return await asyncio.gather(*(engine.score([1, 10 + n]) for n in range(4)))

    assert asyncio.run(gather()) == [(-0.25,)] * 4
    assert engine._pool.num_drops >= 1


def test_a_server_whose_health_fails_gives_up_what_is_in_flight_there(servers, start, tmp_path):
    engine = start(servers, timeout_s=30)
    load(engine, tmp_path, 0)
    servers[0].mode = servers[0].health = "hang"
    begin = time.perf_counter()
    assert len(ask(engine, 4)) == 4
    assert time.perf_counter() - begin < 15


def test_a_server_that_was_taken_back_and_then_hangs_gives_up_requests_from_before(servers, start, tmp_path):
    engine = start(servers, timeout_s=30)
    load(engine, tmp_path, 0)
    server = engine._pool.servers[0]
    servers[0].mode = "hang"

    async def asked_through_both_drops():
        requests = [asyncio.ensure_future(engine.generate([1, 10 + n], SAMPLING)) for n in range(4)]
        while server.num_in_flight < 2:
            await asyncio.sleep(0.01)
        # As `complete` does after a failure; the other requests continue.
        engine._pool._drop(server, "one other request failed")
        while not server.is_healthy:
            await asyncio.sleep(0.01)
        servers[0].health = "hang"
        return await asyncio.gather(*requests)

    begin = time.perf_counter()
    assert len(asyncio.run(asked_through_both_drops())) == 4
    assert time.perf_counter() - begin < 15


def test_as_many_connections_as_rollouts_may_be_open(start, servers):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        start(servers)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 65536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_killed_server_comes_back_with_the_newest_adapter(servers, start, tmp_path):
    engine = start(servers)
    load(engine, tmp_path, 0, -0.25)
    servers[0].kill()
    wait_until(lambda: engine._pool.num_drops == 1)
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
    with pytest.raises(EngineError, match=r"refused a request: 400 .*as it was told to"):
        ask(engine)
    assert sum(len(server.bodies) for server in servers) == 1
    assert engine._pool.num_drops == 0


def test_a_request_that_breaks_every_server_ends(servers, start, tmp_path):
    engine = start(servers)
    load(engine, tmp_path, 0)
    for server in servers:
        server.mode = 500
    with pytest.raises(EngineError, match=r"(?s)a completion failed on servers 5 times in a row.*answered 500"):
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
    with pytest.raises(EngineError, match=r"(?s)no server was left for 0\.5 s") as caught:
        ask(engine, 3)
    assert time.perf_counter() - begin < 15
    for words in (*(server.url for server in servers), "fuchsia serve", "data.engine.init_args.urls"):
        assert words in str(caught.value)
    with pytest.raises(EngineError, match="no server was left"):
        load(engine, tmp_path, 1)


def test_servers_that_never_answer_completions_are_an_error_within_a_bound(servers, start, tmp_path):
    """Their health checks succeed, so they are readmitted repeatedly."""
    engine = start(servers, timeout_s=0.3, recovery_timeout_s=0.3)
    load(engine, tmp_path, 0)
    for server in servers:
        server.mode = "hang"
    begin = time.perf_counter()
    with pytest.raises(EngineError, match=r"a completion (took longer than 0\.9 s|failed on servers 5 times)"):
        ask(engine)
    assert time.perf_counter() - begin < 15
