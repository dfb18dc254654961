"""Fixtures for engines on doubles of vLLM's server."""

import pytest

from fuchsia_pl.engines.vllm_server import VLLMServerEngine
from tests.server_double import FakeServer, make_spec, wait_until


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr("fuchsia_pl.engines.pool.POLL_S", 0.05)
    monkeypatch.setattr("fuchsia_pl.engines.pool.BACKOFF_S", 0.01)
    monkeypatch.setattr("fuchsia_pl.engines.vllm_http.QUICK_TIMEOUT_S", 0.5)


@pytest.fixture
def servers(short_waits):
    made = [FakeServer(), FakeServer()]
    yield made
    for server in made:
        server.kill()


@pytest.fixture
def start(short_waits, tmp_path):
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
