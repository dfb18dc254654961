"""The guard of a server's paths, in front of vLLM's own application with all of its routes."""

import asyncio
import logging
from itertools import product

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fuchsia_pl.engines.vllm_guard import KeyGuard

KEY = "a key with blanks"
RIGHT = {"Authorization": f"Bearer {KEY}"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
TASKS = ("generate", "embed", "classify", "score", "transcription", "realtime", "render")


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.fixture
def client(key):
    """A small application; `client.reached` contains the requests that reached it."""
    reached = []

    async def answer(request):
        reached.append(f"{request.method} {request.url.path}")
        return PlainTextResponse("reached")

    async def talk(websocket):
        await websocket.accept()
        await websocket.send_text("reached")
        await websocket.close()

    paths = ("/health", "/ping", "/invocations", "/health/more", "/")
    routes = [Route(path, answer, methods=["GET", "POST", "OPTIONS"]) for path in paths]
    app = Starlette(routes=[*routes, WebSocketRoute("/talk", talk), WebSocketRoute("/health", talk)])
    client = TestClient(KeyGuard(app))
    client.reached = reached
    return client


def test_only_health_and_ping_are_open(client):
    for path in ("/health", "/ping"):
        assert client.get(path).text == "reached"
        assert client.post(path).status_code == 401
    closed = ("/", "/invocations", "/health/", "/health/more", "//health", "/Health", "/metrics", "/no/such/path")
    for path, method in product(closed, METHODS):
        assert client.request(method, path).status_code == 401, (method, path)
    assert client.reached == ["GET /health", "GET /ping"]
    assert client.get("/invocations", headers=RIGHT).text == "reached"
    assert client.get("/metrics", headers=RIGHT).status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": b"Bearer \xff\xfe"},
        {"X-Authorization": f"Bearer {KEY}"},
        [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer other")],
    ],
    ids=str,
)
def test_a_wrong_key_is_refused(client, headers):
    assert client.get("/", headers=headers).status_code == 401
    assert client.reached == []


def test_any_case_of_the_scheme_and_the_header_will_do(client):
    assert client.get("/", headers={"AUTHORIZATION": f"bearer {KEY}"}).text == "reached"


def test_web_sockets_need_the_key_too(client):
    for path in ("/talk", "/health"):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect(path):
            pass
        with client.websocket_connect(path, headers=RIGHT) as socket:
            assert socket.receive_text() == "reached"


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_key_there_is_no_guard(monkeypatch, value):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_API_KEY", value)
    with pytest.raises(ValueError, match="VLLM_API_KEY is not set"):
        KeyGuard(Starlette())


@pytest.fixture
def served(key, monkeypatch):
    """vLLM's application, as `fuchsia serve` opens it, with no engine behind it."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    guard = f"{KeyGuard.__module__}.{KeyGuard.__qualname__}"
    words = ["--model", "tiny", "--middleware", guard]
    level, handlers = logging.root.level, [*logging.root.handlers]
    yield build_app(make_arg_parser(FlexibleArgumentParser()).parse_args(words), TASKS)
    logging.root.setLevel(level)  # a part of it silences the whole process
    logging.root.handlers = handlers


def paths_of(routes) -> list[str]:
    """Every path of an application, including those of mounted applications."""
    found = []
    for route in routes:
        found.append(route.path.replace("{", "").replace("}", ""))
        if isinstance(route, Mount):
            found += [f"{route.path}/", f"{route.path}/x"]
    return found


def test_every_route_of_vllm_asks_for_the_key(served):
    paths = paths_of(served.routes)
    assert len(paths) > 60
    assert {"/invocations", "/metrics", "/docs", "/openapi.json", "/collective_rpc", "/v1/realtime", "/ping"} <= set(
        paths
    )

    async def statuses(headers) -> dict[tuple[str, str], int]:
        transport = httpx.ASGITransport(served, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
            return {
                (method, path): (await client.request(method, path)).status_code
                for method, path in product(METHODS, paths)
            }

    for headers in ({}, {"Authorization": "Bearer wrong"}):
        found = asyncio.run(statuses(headers))
        is_open = {(method, path) for (method, path), status in found.items() if status != 401}
        assert is_open == set(product(("GET", "HEAD"), ("/health", "/ping")))

    async def with_key() -> list[int]:
        transport = httpx.ASGITransport(served, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=RIGHT) as client:
            return [(await client.get(path)).status_code for path in ("/version", "/metrics", "/docs", "/openapi.json")]

    assert asyncio.run(with_key()) == [200, 200, 200, 200]
    with pytest.raises(WebSocketDisconnect), TestClient(served).websocket_connect("/v1/realtime"):
        pass
