"""A teacher on a vLLM server: any model with the policy's tokenizer, which scores rows and never gets weights."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.engines.published import PublishedWeights
from fuchsia_pl.engines.server_client import ServerGoneError, UnknownWeightsError
from fuchsia_pl.engines.vllm_guard import API_KEY_VARIABLE
from fuchsia_pl.engines.vllm_http import VLLMClient
from fuchsia_pl.types import ConfigError

# Bounds of a row: seconds of one request, and requests until the run ends.
TIMEOUT_S = 600.0
MAX_TRIES = 5
BACKOFF_S = 0.5
MAX_IN_FLIGHT = 64
# Entries of the vocabulary that the tokenizers are compared on: this many from all of it, and the last ones.
NUM_PROBES, NUM_LAST = 1024, 64
PROBE_ROW = 16  # tokens of a row that is scored at the start

T = TypeVar("T")


class TeacherServer:
    """The connection to a teacher. All coroutines run on one event loop.

    Args:
        url: Address of the server.
        name: Name under which the server lists the model.
    """

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url.rstrip("/").removesuffix("/v1").rstrip("/"), name
        self._client = VLLMClient(self.url, os.environ.get(API_KEY_VARIABLE) or None)
        self._weights = PublishedWeights(name, 0, Path())

    async def check(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        """Checks that the server can score the rows of a run.

        Args:
            tokenizer: The policy's tokenizer.
            max_length: Longest row in tokens.

        Raises:
            ConfigError: The server does not list the model, has shorter rows or another tokenizer, or does not score a row.
            EngineError: It does not answer.
        """
        names = await self._answered(self._client.names, "the list of its models")
        if self.name not in names:
            raise ConfigError(
                f"the server {self.url} of data.teacher has no model {self.name!r}: set its name to one of {sorted(names)}"
            )
        base = await self._answered(self._client.model, "its model")
        if base.max_length < max_length:
            raise ConfigError(
                f"the server {self.url} of data.teacher was started for {base.max_length} tokens, and data.sampling.max_length "
                f"is {max_length}: start it with a larger max_model_len"
            )
        text = probe_text(tokenizer)
        theirs = await self._answered(partial(self._client.tokenize, self.name, text), "the ids of a text")
        ours = tokenizer.encode(text, add_special_tokens=False)
        if theirs != ours:
            raise ConfigError(
                f"the teacher {self.name!r} on {self.url} has another tokenizer than the policy, so it would read other text: "
                "use a teacher of the policy's model family"
            )
        try:
            await self.score([theirs[:PROBE_ROW]])
        except EngineError as error:
            raise ConfigError(f"the server {self.url} of data.teacher does not score rows: {error}") from error

    async def score(self, rows: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Logprobs of the ids of rows but their first one, see `Engine.score`.

        Raises:
            EngineError: The server refuses a row, or does not answer repeatedly.
        """
        free = asyncio.Semaphore(MAX_IN_FLIGHT)

        async def of_row(row: Sequence[int]) -> tuple[float, ...]:
            async with free:
                ask = partial(self._client.score, self._weights, row, TIMEOUT_S)
                return await self._answered(ask, "the logprobs of a row")

        return list(await asyncio.gather(*(of_row(row) for row in rows)))

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def _answered(self, ask: Callable[[], Awaitable[T]], what: str) -> T:
        """The answer of the server, which may fail to answer a few times in a row."""
        reason = ""
        for attempt in range(MAX_TRIES):
            try:
                return await ask()
            except UnknownWeightsError as error:
                raise EngineError(
                    f"the server {self.url} of data.teacher has no model {self.name!r} any more: {error}"
                ) from error
            except ConfigError as error:  # its advice is for the policy's engine
                raise ConfigError(
                    f"the server {self.url} of data.teacher refused the API key: set the environment variable "
                    f"{API_KEY_VARIABLE} to that of the server"
                ) from error
            except ServerGoneError as error:
                reason = str(error)
            await asyncio.sleep(BACKOFF_S * 2**attempt)
        raise EngineError(
            f"the server {self.url} of data.teacher did not return {what} in {MAX_TRIES} attempts ({reason}): start it, or "
            "correct data.teacher.url"
        )


def probe_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """A text of entries from all of a vocabulary, its last ones and its special tokens. Two tokenizers rarely agree on it."""
    size = len(tokenizer)
    ids = [*range(0, size, max(size // NUM_PROBES, 1)), *range(max(size - NUM_LAST, 0), size)]
    return " ".join([*(tokenizer.decode([token]) for token in ids), *tokenizer.all_special_tokens])
