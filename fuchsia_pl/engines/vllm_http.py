"""One vLLM server over HTTP, with adapters loaded by name."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx

from fuchsia_pl.engines.base import EngineError, SamplingParams
from fuchsia_pl.engines.published import PublishedWeights
from fuchsia_pl.engines.server_client import HostedModel, ServerClient, ServerGoneError, UnknownWeightsError
from fuchsia_pl.engines.vllm_convert import (
    from_response,
    logprobs_from_response,
    to_request,
    to_scoring_request,
)
from fuchsia_pl.types import Completion, ConfigError

# vLLM's server closes an idle connection after 5 s. A request on a connection that is just being closed would fail.
KEEP_ALIVE_S = 2.0
QUICK_TIMEOUT_S = 20.0
MAX_EXCERPT = 500


class VLLMClient(ServerClient):
    """Client of one vLLM server; see `ServerClient`. Trained weights are adapters.

    Args:
        url: Address of the server, without `/v1`.
        api_key: Key that the server was started with, None if it requires none.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=key_headers(api_key),
            timeout=None,  # each request has its own timeout
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S),
            trust_env=False,  # no proxy between a trainer and its servers
        )

    async def health(self) -> None:
        """Returns if the server and its engine run; see `ServerClient.health`."""
        response = await self._request("GET", "/health", QUICK_TIMEOUT_S)
        if response.status_code != httpx.codes.OK:
            raise ServerGoneError(f"/health answered {_excerpt(response)}")

    async def model(self) -> HostedModel:
        """The model that the server was started with."""
        card = next(card for card in await self._models() if card.get("parent") is None)
        return HostedModel(str(card.get("id")), str(card.get("root")), card.get("max_model_len") or 0)

    async def load(self, weights: PublishedWeights, timeout_s: float) -> None:
        """Makes the server load an adapter; see `ServerClient.load`."""
        if weights.name in await self._adapters():
            return
        await self._load_adapter(weights, timeout_s)
        if weights.name not in await self._adapters():
            raise EngineError(f"the vLLM server {self.url} does not list {weights.name} after its load")

    async def forget(self, names: set[str]) -> None:
        """Unloads those of the adapters that the server has."""
        for name in names & await self._adapters():
            await self._request("POST", "/v1/unload_lora_adapter", QUICK_TIMEOUT_S, {"lora_name": name})

    async def complete(
        self, weights: PublishedWeights, prompt_ids: Sequence[int], sampling: SamplingParams, timeout_s: float
    ) -> Completion:
        """Generates one completion; see `ServerClient.complete`."""
        answer = await self._answer(to_request(weights.name, prompt_ids, sampling), timeout_s)
        return from_response(answer, weights.name, weights.version)

    async def score(self, weights: PublishedWeights, token_ids: Sequence[int], timeout_s: float) -> tuple[float, ...]:
        """Computes the logprobs of given ids; see `ServerClient.score`.

        A server on a CPU that serves an adapter ends if several rows are in one batch (its LoRA kernels take one row of prompt
        logits per request): score one row at a time there.
        """
        answer = await self._answer(to_scoring_request(weights.name, token_ids), timeout_s)
        return logprobs_from_response(answer, weights.name, token_ids)

    async def names(self) -> set[str]:
        """Names of all models and adapters that the server lists."""
        return {str(card.get("id")) for card in await self._models()}

    async def tokenize(self, model: str, text: str) -> list[int]:
        """The ids of a text by the server's tokenizer, in which names of special tokens are these tokens.

        Args:
            model: Name of the model.
            text: The text.

        Raises:
            EngineError: The server has no `/tokenize`, or refuses the request.
        """
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        response = await self._request("POST", "/tokenize", QUICK_TIMEOUT_S, body)
        found = _json(response).get("tokens") if response.status_code == httpx.codes.OK else None
        if not isinstance(found, list):
            raise EngineError(f"the vLLM server {self.url} did not tokenize a text: {_excerpt(response)}")
        return found

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def _answer(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The decoded answer of `/v1/completions`; for the errors see `ServerClient.complete`."""
        response = await self._request("POST", "/v1/completions", timeout_s, body)
        if response.is_server_error:
            raise ServerGoneError(f"/v1/completions answered {_excerpt(response)}")
        if response.status_code == httpx.codes.NOT_FOUND:
            raise UnknownWeightsError(_excerpt(response))
        if response.status_code != httpx.codes.OK:
            raise EngineError(f"the vLLM server {self.url} refused a request: {_excerpt(response)}")
        return _json(response)

    async def _load_adapter(self, weights: PublishedWeights, timeout_s: float) -> None:
        body = {"lora_name": weights.name, "lora_path": str(weights.folder)}
        response = await self._request("POST", "/v1/load_lora_adapter", timeout_s, body)
        if response.status_code == httpx.codes.OK:
            return
        reason = _excerpt(response)
        if response.is_server_error:
            await self.health()  # a dead engine answers with a server error too
        if "already been loaded" in reason:
            return
        advice = "start it with `fuchsia serve`, which lets adapters of the policy's rank be loaded"
        if weights.name in reason:
            advice = (
                "data.engine.init_args.adapter_folder must be a folder that trainer and servers see under the same path"
            )
        raise EngineError(
            f"the vLLM server {self.url} did not load the adapter in {weights.folder}: {reason}: {advice}"
        )

    async def _adapters(self) -> set[str]:
        """Names of the adapters that the server has."""
        return {card["id"] for card in await self._models() if card.get("parent") is not None}

    async def _models(self) -> list[dict[str, Any]]:
        response = await self._request("GET", "/v1/models", QUICK_TIMEOUT_S)
        if response.status_code != httpx.codes.OK:
            raise ServerGoneError(f"/v1/models answered {_excerpt(response)}")
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
    """Headers of every request to a server.

    >>> key_headers("secret"), key_headers(None)
    ({'Authorization': 'Bearer secret'}, {})
    """
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        return response.json()
    except ValueError:
        raise ServerGoneError(f"the answer of {response.url} is not JSON: {_excerpt(response)}") from None


def _excerpt(response: httpx.Response) -> str:
    return f"{response.status_code} {response.text[:MAX_EXCERPT]}"
