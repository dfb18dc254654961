"""One vLLM server over HTTP: what is asked of it, and what its answers mean."""

import asyncio
from pathlib import Path
from typing import Any

import httpx

from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.engines.published import PublishedWeights
from fuchsia_pl.types import ConfigError

# vLLM's server closes an idle connection after 5 s; one that is taken up again just then would fail.
KEEP_ALIVE_S = 2.0
QUICK_TIMEOUT_S = 20.0
MAX_WORDS = 500


class ServerGoneError(Exception):
    """The server cannot be asked for now: it does not answer, or says itself that it is broken."""


class UnknownWeightsError(Exception):
    """The server has no weights of the name that was asked."""


class VLLMClient:
    """What we ask of a vLLM server. All coroutines are of one event loop and end within their bounds.

    Args:
        url: Of the server, without `/v1`.
        api_key: What the server was started with, None where it asks for none.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=key_headers(api_key),
            timeout=None,  # each request has its own
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S),
            trust_env=False,  # no proxy stands between a trainer and its servers
        )

    async def check_health(self) -> None:
        """Returns where the server and its engine run.

        Raises:
            ServerGoneError: They do not.
        """
        response = await self._request("GET", "/health", QUICK_TIMEOUT_S)
        if response.status_code != httpx.codes.OK:
            raise ServerGoneError(f"/health answered {_words(response)}")

    async def base_model(self) -> dict[str, Any]:
        """The model that the server was started with: `id`, `root`, `max_model_len`."""
        return next(card for card in await self._models() if card.get("parent") is None)

    async def adapters(self) -> set[str]:
        """The names of the adapters that the server has."""
        return {card["id"] for card in await self._models() if card.get("parent") is not None}

    async def serve(self, weights: PublishedWeights, timeout_s: float) -> None:
        """Makes the server answer to the name of some weights, or returns at once where it does.

        Args:
            weights: An adapter.
            timeout_s: Bound in seconds.

        Raises:
            ServerGoneError: The server does not answer or is broken.
            EngineError: It runs and refuses.
        """
        if weights.name in await self.adapters():
            return
        await self.load_adapter(weights.name, weights.folder, timeout_s)
        if weights.name not in await self.adapters():
            raise EngineError(f"the vLLM server {self.url} does not list {weights.name} after its load")

    async def forget(self, names: set[str]) -> None:
        """Frees what the server keeps of weights that no request asks for any more."""
        for name in names & await self.adapters():
            await self.unload_adapter(name)

    async def load_adapter(self, name: str, folder: Path, timeout_s: float) -> None:
        """Makes the server load an adapter, or returns where it has one of that name.

        Args:
            name: Of the adapter.
            folder: As the server sees it.
            timeout_s: Bound in seconds.

        Raises:
            ServerGoneError: The server does not answer or is broken.
            EngineError: It runs and refuses.
        """
        body = {"lora_name": name, "lora_path": str(folder)}
        response = await self._request("POST", "/v1/load_lora_adapter", timeout_s, body)
        if response.status_code == httpx.codes.OK:
            return
        words = _words(response)
        if response.is_server_error:
            await self.check_health()  # of an engine that died, this is what is said
        if "already been loaded" in words:
            return
        advice = "start it with `fuchsia serve`, which lets adapters of the policy's rank be loaded"
        if name in words:
            advice = (
                "data.engine.init_args.adapter_folder must be a folder that trainer and servers see under the same path"
            )
        raise EngineError(f"the vLLM server {self.url} did not load the adapter in {folder}: {words}: {advice}")

    async def unload_adapter(self, name: str) -> None:
        """Makes the server forget an adapter, if it has it."""
        await self._request("POST", "/v1/unload_lora_adapter", QUICK_TIMEOUT_S, {"lora_name": name})

    async def complete(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Asks for a completion.

        Args:
            body: As `vllm_convert.to_request` makes it.
            timeout_s: Bound in seconds.

        Raises:
            ServerGoneError: The server does not answer or is broken: another may be asked the same.
            UnknownWeightsError: It has no weights of that name.
            EngineError: It runs and refuses the request, as any other would.
        """
        response = await self._request("POST", "/v1/completions", timeout_s, body)
        if response.is_server_error:
            raise ServerGoneError(f"/v1/completions answered {_words(response)}")
        if response.status_code == httpx.codes.NOT_FOUND:
            raise UnknownWeightsError(_words(response))
        if response.status_code != httpx.codes.OK:
            raise EngineError(f"the vLLM server {self.url} refused a completion: {_words(response)}")
        return _json(response)

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def _models(self) -> list[dict[str, Any]]:
        response = await self._request("GET", "/v1/models", QUICK_TIMEOUT_S)
        if response.status_code != httpx.codes.OK:
            raise ServerGoneError(f"/v1/models answered {_words(response)}")
        return _json(response)["data"]

    async def _request(
        self, method: str, path: str, timeout_s: float, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._http.request(method, path, json=body)
        except TimeoutError:
            raise ServerGoneError(f"{path} did not answer within {timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise ServerGoneError(f"{path} failed ({type(error).__name__}: {error})") from error
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise ConfigError(
                f"the vLLM server {self.url} refused the API key ({response.status_code}): set the environment variable "
                "VLLM_API_KEY or data.engine.init_args.api_key to that of `fuchsia serve`"
            )
        return response


def key_headers(api_key: str | None) -> dict[str, str]:
    """What every request to a server brings.

    >>> key_headers("secret"), key_headers(None)
    ({'Authorization': 'Bearer secret'}, {})
    """
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        return response.json()
    except ValueError:
        raise ServerGoneError(f"{response.url} answered what is no JSON: {_words(response)}") from None


def _words(response: httpx.Response) -> str:
    return f"{response.status_code} {response.text[:MAX_WORDS]}"
