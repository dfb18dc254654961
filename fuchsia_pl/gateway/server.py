"""The HTTP server of the endpoints. It runs on the event loop of the rollouts."""

import asyncio
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from fuchsia_pl.gateway.chat_api import ApiError, events, models
from fuchsia_pl.gateway.chat_api import completion as whole_answer
from fuchsia_pl.gateway.sessions import Session
from fuchsia_pl.types import ConfigError

START_TIMEOUT_S = STOP_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0  # of the head and of the body of a request
KEEP_ALIVE_S = 75
WRITE_TIMEOUT_S = 60.0  # of a streamed answer
POLL_S = 0.01
LOOPBACK = "127.0.0.1"
EVERY_ADDRESS = {"": LOOPBACK, "0.0.0.0": LOOPBACK, "::": "::1"}  # and the address that reaches it from this machine


class AgentServer:
    """Serves the sessions of all rollouts of this process.

    Args:
        host: Address to listen on.
        port: Port, 0 for a free one.
        max_body_bytes: Largest body of a request.
    """

    def __init__(self, host: str, port: int, max_body_bytes: int) -> None:
        self.host = host
        self.port = port
        self.max_body_bytes = max_body_bytes
        self._sessions: dict[str, Session] = {}
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it serves on the running event loop."""
        serving = self._serving
        return serving is not None and not serving.done() and serving.get_loop() is asyncio.get_running_loop()

    @property
    def base_url(self) -> str:
        """Address for clients on this machine."""
        host = EVERY_ADDRESS.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    async def start(self) -> None:
        """Starts to serve.

        Raises:
            ConfigError: The address cannot be used, or the server did not start in time.
        """
        try:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            listener = socket.create_server((self.host, self.port), family=family, backlog=1024)
        except OSError as error:
            raise ConfigError(
                f"the endpoint for agents cannot listen on {self.host}:{self.port} ({error}): set another host, or port 0 for a "
                "free one"
            ) from error
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app(),
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        self._server = QuietServer(config)
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))
        with suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                while not self._server.started and self.is_running:
                    await asyncio.sleep(POLL_S)
        if not self._server.started:
            await self.stop()
            raise ConfigError(f"the endpoint for agents on {self.host}:{self.port} did not start")

    async def stop(self) -> None:
        """Ends the server and all connections."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = self._server.force_exit = True
            await asyncio.wait([self._serving], timeout=STOP_TIMEOUT_S)
            self._serving.cancel()
        self._server = self._serving = None

    def add(self, session: Session) -> None:
        """Serves a session."""
        self._sessions[session.key] = session

    async def end(self, session: Session) -> None:
        """Closes a session. Its key is not valid afterwards."""
        self._sessions.pop(session.key, None)
        await session.close()

    def _app(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
        ]
        handlers: Any = {ApiError: _error, HTTPException: _http_error}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _models(self, request: Request) -> Response:
        self._session(request)
        return JSONResponse(models())

    async def _chat(self, request: Request) -> Response:
        session = self._session(request)
        try:
            raw = await self._body(request)
        except ApiError:
            session.count_refused()
            raise
        answer = await session.answer(raw)
        if answer[0].stream:
            return BoundedStream(_one_by_one(events(*answer)), media_type="text/event-stream")
        return JSONResponse(whole_answer(*answer))

    def _session(self, request: Request) -> Session:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        session = self._sessions.get(key.strip()) if scheme.lower() == "bearer" else None
        if session is None:
            raise ApiError(401, "invalid_api_key", "the API key is not that of a rollout in progress")
        return session

    async def _body(self, request: Request) -> bytes:
        found = bytearray()
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                async for part in request.stream():
                    found += part
                    if len(found) > self.max_body_bytes:
                        raise ApiError(413, "body_too_large", f"a body may have {self.max_body_bytes} bytes")
        except TimeoutError:
            raise ApiError(408, "body_too_slow", f"the body did not arrive within {READ_TIMEOUT_S:g} s") from None
        except ClientDisconnect:
            raise ApiError(400, "client_gone", "the client closed the connection") from None
        return bytes(found)


class BoundedStream(StreamingResponse):
    """A streamed answer. A client that does not read it is left."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await super().__call__(scope, receive, send)


class QuietServer(uvicorn.Server):
    """A server that leaves the signals to the run."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


class BoundedProtocol(H11Protocol):
    """HTTP with a time limit for the head of a request; uvicorn itself waits for it without one."""

    def connection_made(self, transport: Any) -> None:
        """Starts the clock of the first head. Beyond half of the files that the process may open, it ends the connection."""
        super().connection_made(transport)
        self._waits_since: float | None = self.loop.time()
        self._watch()
        if len(self.connections) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:  # the run needs files, too
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Stops the clock when a head is complete."""
        if self._waits_since is None and not self._is_serving:
            self._waits_since = self.loop.time()
        super().data_received(data)
        if self._is_serving:
            self._waits_since = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the watch."""
        self._watcher.cancel()
        super().connection_lost(exc)

    @property
    def _is_serving(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        if self._waits_since is not None and self.loop.time() - self._waits_since > READ_TIMEOUT_S:
            self.transport.close()
        self._watcher = self.loop.call_later(1.0, self._watch)


async def _one_by_one(parts: Iterator[str]) -> AsyncIterator[str]:
    """The parts of an answer. Starlette takes those of a plain iterator in threads."""
    for part in parts:
        yield part


async def _error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status)


async def _http_error(request: Request, error: HTTPException) -> Response:
    served = "/v1/chat/completions and /v1/models are served"
    found = ApiError(
        error.status_code, "unknown_url", f"{request.method} {request.url.path[:100]} is not served: {served}"
    )
    return JSONResponse(found.body, status_code=error.status_code)
