"""The API key for every path of a vLLM server. vLLM itself requires it under `/v1` and a few other paths only.

`fuchsia serve` passes this class to vLLM (`--middleware`), which applies it to all routes. It imports nothing of vLLM.
"""

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

API_KEY_VARIABLE = "VLLM_API_KEY"
# Health checks work without the key.
OPEN_PATHS = ("/health", "/ping")
OPEN_METHODS = ("GET", "HEAD")
UNAUTHORIZED = 401
POLICY_VIOLATION = 1008  # closes a web socket; before the socket is accepted, it becomes the status 403


class KeyGuard:
    """ASGI middleware: a request without the key of the environment variable VLLM_API_KEY reaches no route.

    It is refused for every path and method, before its body is read. Only `GET` and `HEAD` of `/health` and `/ping` are open.
    Web sockets need the key too.

    Args:
        app: The guarded application.

    Raises:
        ValueError: The environment variable is not set.
    """

    def __init__(self, app: App) -> None:
        key = os.environ.get(API_KEY_VARIABLE)
        if not key:
            raise ValueError(
                f"the environment variable {API_KEY_VARIABLE} is not set: requests cannot be checked without a key"
            )
        self._app = app
        self._digest = _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request with the key to the application, and refuses all others."""
        kind = scope["type"]
        if kind == "lifespan" or _is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
        elif kind == "http":
            body = json.dumps({"error": "Unauthorized"}).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"www-authenticate", b"Bearer"),
            ]
            await send({"type": "http.response.start", "status": UNAUTHORIZED, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        else:
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})

    def _has_key(self, scope: Scope) -> bool:
        """Whether there is exactly one header `Authorization: Bearer <key>`. Takes the same time for every wrong key."""
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(key), self._digest)


def _is_open(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] in OPEN_METHODS and scope["path"] in OPEN_PATHS


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
