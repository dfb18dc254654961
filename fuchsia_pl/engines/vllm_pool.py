"""Several vLLM servers as one: whoever is free is asked, whoever goes away is dropped and taken back with the newest weights."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.engines.published import PublishedWeights
from fuchsia_pl.engines.vllm_http import ServerGoneError, UnknownWeightsError, VLLMClient
from fuchsia_pl.types import ConfigError

# How often each server is asked whether it is well: a dropped one comes back this much later at most.
POLL_S = 2.0
# A request is seeded, so it may be asked again anywhere. One that breaks every server that it meets must end.
MAX_TRIES = 5
BACKOFF_S = 0.2

T = TypeVar("T")
Check = Callable[[str, dict[str, Any]], None]
logger = logging.getLogger(__name__)


class PooledServer:
    """What is known of one server.

    Args:
        client: How it is asked.
    """

    def __init__(self, client: VLLMClient) -> None:
        self.client = client
        self.is_healthy = False
        self.num_in_flight = 0
        self.last_error = "none so far"
        self.loading = asyncio.Lock()
        self.gone = asyncio.Event()  # what is in flight there will not be answered

    async def unless_gone(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Awaits an answer of the server for as long as the server is there.

        Raises:
            ServerGoneError: The server went away.
        """
        answer, gone = asyncio.ensure_future(coroutine), asyncio.ensure_future(self.gone.wait())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            raise ServerGoneError(self.last_error)
        finally:
            answer.cancel()
            gone.cancel()


class ServerPool:
    """The servers of a run. All coroutines are of one event loop.

    Args:
        clients: One per server.
        check: Refuses a server by its url and base model.
        timeout_s: Bound of one request to one server.
        recovery_timeout_s: How long the pool waits for a server when none is left.
    """

    def __init__(
        self, clients: Sequence[VLLMClient], check: Check, timeout_s: float, recovery_timeout_s: float
    ) -> None:
        self.servers = [PooledServer(client) for client in clients]
        self.num_drops = 0
        self.retired: set[str] = set()  # names that no request asks for any more
        self._check = check
        self._timeout_s = timeout_s
        self._recovery_timeout_s = recovery_timeout_s
        self._newest: PublishedWeights | None = None
        self._some_healthy = asyncio.Event()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Waits for the first server; others join when they are ready.

        Raises:
            ConfigError: A server cannot serve this run.
            EngineError: No server was ready in time.
        """
        self._watchers = [asyncio.ensure_future(self._watch(server)) for server in self.servers]
        try:
            await asyncio.wait_for(self._started, self._timeout_s)
        except TimeoutError:
            raise EngineError(self.words(f"no vLLM server was ready within {self._timeout_s:g} s")) from None

    async def load(self, weights: PublishedWeights) -> None:
        """Makes some weights the newest: every server that is well has them on return, and each that comes back gets them.

        Raises:
            EngineError: No server is left, or one refuses them.
        """
        self._newest = weights
        for _ in range(MAX_TRIES):
            await self._wait_for_one()
            healthy = [server for server in self.servers if server.is_healthy]
            if any(await asyncio.gather(*(self._load_or_drop(server, weights) for server in healthy))):
                return
        raise EngineError(self.words(f"no vLLM server loaded {weights.name} in {MAX_TRIES} attempts"))

    async def complete(self, weights: PublishedWeights, body: dict[str, Any]) -> dict[str, Any]:
        """Asks the server with the fewest requests in flight, and another one where that goes away.

        Args:
            weights: Whose name the request asks for.
            body: The request.

        Raises:
            EngineError: No server is left, or one refuses the request, or it broke every one that it met.
        """
        for attempt in range(MAX_TRIES):
            await self._wait_for_one()
            server = min((s for s in self.servers if s.is_healthy), key=lambda s: s.num_in_flight)
            try:
                return await self._ask(server, weights, body)
            except ServerGoneError as error:
                self._drop(server, str(error))
            await asyncio.sleep(BACKOFF_S * 2**attempt)
        raise EngineError(self.words(f"a completion failed on {MAX_TRIES} vLLM servers in turn"))

    async def forget_retired(self) -> None:
        """Makes the servers that are well forget the weights that no request asks for any more."""
        healthy = [server for server in self.servers if server.is_healthy]
        await asyncio.gather(*(server.client.forget(self.retired) for server in healthy), return_exceptions=True)

    async def close(self) -> None:
        """Closes the connections. The servers run on."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for server in self.servers:
            await server.client.close()

    async def _watch(self, server: PooledServer) -> None:
        """Asks a server again and again whether it is well, drops it where it is not, and takes it back."""
        while True:
            try:
                await server.client.check_health()
                if not server.is_healthy:
                    await self._admit(server)
            except ConfigError as error:
                self._drop(server, str(error))
                if not self._started.done():
                    self._started.set_exception(error)
            except Exception as error:  # whatever it is, the server is not asked before it passes
                self._drop(server, str(error))
                server.gone.set()
            await asyncio.sleep(POLL_S)

    async def _admit(self, server: PooledServer) -> None:
        self._check(server.client.url, await server.client.base_model())
        loaded = None
        while self._newest is not loaded:  # a newer one may come while this one loads
            loaded = self._newest
            assert loaded is not None
            await self._load(server, loaded)
        if self._started.done():
            logger.warning("the vLLM server %s is asked from now on", server.client.url)
        else:
            self._started.set_result(None)
        server.is_healthy = True
        server.gone.clear()  # the same event: requests from before still wait on it
        self._some_healthy.set()

    async def _load_or_drop(self, server: PooledServer, weights: PublishedWeights) -> bool:
        try:
            await server.unless_gone(self._load(server, weights))
        except ServerGoneError as error:
            self._drop(server, str(error))
            return False
        return True

    async def _load(self, server: PooledServer, weights: PublishedWeights) -> None:
        async with server.loading:
            await server.client.serve(weights, self._timeout_s)
            await server.client.forget(self.retired)

    async def _ask(self, server: PooledServer, weights: PublishedWeights, body: dict[str, Any]) -> dict[str, Any]:
        server.num_in_flight += 1
        try:
            try:
                return await server.unless_gone(server.client.complete(body, self._timeout_s))
            except UnknownWeightsError:  # the server was started anew between two looks at it
                await server.unless_gone(self._load(server, weights))
                return await server.unless_gone(server.client.complete(body, self._timeout_s))
        except UnknownWeightsError as error:
            raise EngineError(
                f"the vLLM server {server.client.url} loaded {weights.name} and does not know them: {error}"
            ) from error
        finally:
            server.num_in_flight -= 1

    def _drop(self, server: PooledServer, reason: str) -> None:
        is_news, server.last_error = reason != server.last_error, reason
        if server.is_healthy:
            server.is_healthy = False
            self.num_drops += 1
            logger.warning("the vLLM server %s is dropped (drop %d): %s", server.client.url, self.num_drops, reason)
        elif is_news:
            logger.warning("the vLLM server %s cannot be asked: %s", server.client.url, reason)

    async def _wait_for_one(self) -> None:
        try:
            async with asyncio.timeout(self._recovery_timeout_s):
                while not any(server.is_healthy for server in self.servers):
                    self._some_healthy.clear()
                    await self._some_healthy.wait()
        except TimeoutError:
            raise EngineError(self.words(f"no vLLM server was left for {self._recovery_timeout_s:g} s")) from None

    def words(self, what: str) -> str:
        """What went wrong, with the last error of each server and what to do."""
        lines = [f"  {server.client.url}: {server.last_error}" for server in self.servers]
        return "\n".join(
            [
                f"{what}. The last error of each:",
                *lines,
                "Start one with `fuchsia serve` and the configs of this run (without overlays/server.yaml), or correct "
                "data.engine.init_args.urls",
            ]
        )
