"""Several servers as one engine: a request goes to the least loaded one; a broken one is dropped and later readmitted."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from fuchsia_pl.engines.base import EngineError, SamplingParams
from fuchsia_pl.engines.published import PublishedWeights
from fuchsia_pl.engines.server_client import HostedModel, ServerClient, ServerGoneError, UnknownWeightsError
from fuchsia_pl.types import Completion, ConfigError

# Interval of the health checks of each server, and so the longest delay until a dropped one is readmitted.
POLL_S = 2.0
# Requests are seeded, so any server may repeat one. The bound ends a request that breaks every server.
MAX_TRIES = 5
BACKOFF_S = 0.2

T = TypeVar("T")
Check = Callable[[str, HostedModel], None]
Request = Callable[[ServerClient], Coroutine[Any, Any, T]]
logger = logging.getLogger(__name__)


class PooledServer:
    """State of one server.

    Args:
        client: Connection to the server.
    """

    def __init__(self, client: ServerClient) -> None:
        self.client = client
        self.is_healthy = False
        self.num_in_flight = 0
        self.last_error = "none so far"
        self.loading = asyncio.Lock()
        self.gone = asyncio.Event()  # set: requests in flight there get no answer

    async def unless_gone(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Awaits an answer of the server, and stops when the server is gone.

        Raises:
            ServerGoneError: The server is gone.
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
    """The servers of a run. All coroutines run on one event loop.

    Args:
        clients: One per server.
        check: Raises `ConfigError` for the url and base model of a server that cannot serve the run.
        timeout_s: Bound of one request to one server.
        recovery_timeout_s: How long the pool waits for a server when none is left.
    """

    def __init__(
        self, clients: Sequence[ServerClient], check: Check, timeout_s: float, recovery_timeout_s: float
    ) -> None:
        self.servers = [PooledServer(client) for client in clients]
        self.num_drops = 0
        self._retired: set[str] = set()
        self._check = check
        self._timeout_s = timeout_s
        self._recovery_timeout_s = recovery_timeout_s
        self._newest: PublishedWeights | None = None
        self._some_healthy = asyncio.Event()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Waits for the first server. Others join when they are ready.

        Raises:
            ConfigError: A server cannot serve this run.
            EngineError: No server was ready in time.
        """
        self._watchers = [asyncio.ensure_future(self._watch(server)) for server in self.servers]
        try:
            await asyncio.wait_for(self._started, self._timeout_s)
        except TimeoutError:
            raise EngineError(self.report(f"no server was ready within {self._timeout_s:g} s")) from None

    async def load(self, weights: PublishedWeights) -> None:
        """Makes some weights the newest: each healthy server has them on return, and each readmitted one loads them first.

        Raises:
            EngineError: No server is left, or one refuses them.
        """
        self._newest = weights
        for _ in range(MAX_TRIES):
            await self._wait_for_one()
            healthy = [server for server in self.servers if server.is_healthy]
            if any(await asyncio.gather(*(self._load_or_drop(server, weights) for server in healthy))):
                return
        raise EngineError(self.report(f"no server loaded {weights.name} in {MAX_TRIES} attempts"))

    async def complete(
        self, weights: PublishedWeights, prompt_ids: Sequence[int], sampling: SamplingParams
    ) -> Completion:
        """Generates one completion on the server with the fewest requests in flight, or on another if that one fails.

        Args:
            weights: The weights to generate with.
            prompt_ids: The prompt.
            sampling: How the completion is sampled.

        Raises:
            EngineError: No server is left, or one refuses the request, or the request broke each server that it reached.
        """

        def request(client: ServerClient) -> Coroutine[Any, Any, Completion]:
            return client.complete(weights, prompt_ids, sampling, self._timeout_s)

        return await self._on_some_server(weights, request, "a completion")

    async def score(self, weights: PublishedWeights, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Computes the logprobs of given ids; see `ServerClient.score`. Servers are chosen as for `complete`.

        Raises:
            EngineError: As with `complete`.
        """

        def request(client: ServerClient) -> Coroutine[Any, Any, tuple[float, ...]]:
            return client.score(weights, token_ids, self._timeout_s)

        return await self._on_some_server(weights, request, "the logprobs of a row")

    def retire(self, names: Iterable[str]) -> None:
        """Marks weights that no request names any more. Servers forget them at their next load."""
        self._retired |= set(names)

    async def forget_retired(self) -> None:
        """Makes the healthy servers forget the retired weights now."""
        healthy = [server for server in self.servers if server.is_healthy]
        await asyncio.gather(*(server.client.forget(self._retired) for server in healthy), return_exceptions=True)

    async def close(self) -> None:
        """Closes the connections. The servers continue to run."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for server in self.servers:
            await server.client.close()

    def report(self, problem: str) -> str:
        """An error message: the problem, the last error of each server, and what the user can do."""
        lines = [f"  {server.client.url}: {server.last_error}" for server in self.servers]
        return "\n".join(
            [
                f"{problem}. The last error of each:",
                *lines,
                "Start one with `fuchsia serve` and the configs of this run (without overlays/server.yaml), or correct "
                "data.engine.init_args.urls",
            ]
        )

    async def _watch(self, server: PooledServer) -> None:
        """Checks the health of a server for the whole run; drops it when it is broken, and readmits it."""
        while True:
            try:
                await server.client.health()
                if not server.is_healthy:
                    await self._admit(server)
            except ConfigError as error:
                self._drop(server, str(error))
                if not self._started.done():
                    self._started.set_exception(error)
            except Exception as error:  # any error: the server gets no request until the next successful check
                self._drop(server, str(error))
                server.gone.set()
            await asyncio.sleep(POLL_S)

    async def _admit(self, server: PooledServer) -> None:
        self._check(server.client.url, await server.client.model())
        loaded = None
        while self._newest is not loaded:  # newer weights may arrive during the load
            loaded = self._newest
            assert loaded is not None
            await self._load(server, loaded)
        if self._started.done():
            logger.warning("the server %s is in use from now on", server.client.url)
        else:
            self._started.set_result(None)
        server.is_healthy = True
        server.gone.clear()  # the same event: earlier requests still wait for it
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
            await server.client.load(weights, self._timeout_s)
            await server.client.forget(self._retired)

    async def _on_some_server(self, weights: PublishedWeights, request: Request[T], what: str) -> T:
        for attempt in range(MAX_TRIES):
            await self._wait_for_one()
            server = min((s for s in self.servers if s.is_healthy), key=lambda s: s.num_in_flight)
            try:
                return await self._on(server, weights, request)
            except ServerGoneError as error:
                self._drop(server, str(error))
            await asyncio.sleep(BACKOFF_S * 2**attempt)
        raise EngineError(self.report(f"{what} failed on servers {MAX_TRIES} times in a row"))

    async def _on(self, server: PooledServer, weights: PublishedWeights, request: Request[T]) -> T:
        server.num_in_flight += 1
        try:
            try:
                return await server.unless_gone(request(server.client))
            except UnknownWeightsError:  # the server restarted between two health checks
                await server.unless_gone(self._load(server, weights))
                return await server.unless_gone(request(server.client))
        except UnknownWeightsError as error:
            raise EngineError(
                f"the server {server.client.url} loaded {weights.name} and does not have them: {error}"
            ) from error
        finally:
            server.num_in_flight -= 1

    def _drop(self, server: PooledServer, reason: str) -> None:
        is_news, server.last_error = reason != server.last_error, reason
        if server.is_healthy:
            server.is_healthy = False
            self.num_drops += 1
            logger.warning("the server %s is dropped (drop %d): %s", server.client.url, self.num_drops, reason)
        elif is_news:
            logger.warning("the server %s cannot be used: %s", server.client.url, reason)

    async def _wait_for_one(self) -> None:
        try:
            async with asyncio.timeout(self._recovery_timeout_s):
                while not any(server.is_healthy for server in self.servers):
                    self._some_healthy.clear()
                    await self._some_healthy.wait()
        except TimeoutError:
            raise EngineError(self.report(f"no server was left for {self._recovery_timeout_s:g} s")) from None
