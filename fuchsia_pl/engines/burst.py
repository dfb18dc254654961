"""Admission of requests to an engine: in bursts, and never while the engine's weights or its memory change."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from fuchsia_pl.engines.base import EngineError

# A burst is complete when no request has arrived for this long.
SETTLE_S = 0.02
# Upper bound of the wait for a burst, and of the wait for the engine's answers to `pause` and `resume`. A dead engine never
# answers them; the requests then fail with the reason.
MAX_SETTLE_S = 2.0


class BurstGate:
    """Holds requests that arrive together until the engine can schedule them together.

    The rounding of a row depends on the other rows of its batch. If the first request were scheduled while others arrive, the
    batches, and with them the last bits of the logprobs, would depend on timing. All coroutines run on one event loop.

    Args:
        pause: Stops the engine's scheduler. Requests in flight keep their state.
        resume: Starts the scheduler again.
    """

    def __init__(self, pause: Callable[[], Awaitable[None]], resume: Callable[[], Awaitable[None]]) -> None:
        self._pause, self._resume = pause, resume
        self._num_in_flight = 0
        self._is_asleep = False
        self._loading = asyncio.Lock()
        self._paused: asyncio.Future[None] | None = None
        self._resumed: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """One request is in flight inside the block. Its first await must submit the request to the engine.

        Raises:
            EngineError: The engine is asleep.
        """
        self._check_awake()
        async with self._loading:  # a burst resumes the scheduler, which must stay paused while weights change
            pass
        if not self._num_in_flight:
            self._paused = asyncio.ensure_future(self._pause_in_time())
            self._resumed = asyncio.ensure_future(self._resume_when_settled(self._paused))
            # The requests of the burst raise the same error, so this one needs no report.
            self._resumed.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._num_in_flight += 1
        try:
            assert self._paused is not None
            await asyncio.shield(self._paused)
            yield
        finally:
            self._num_in_flight -= 1

    @asynccontextmanager
    async def load(self, in_flight: bool) -> AsyncIterator[None]:
        """The engine's weights may change inside the block.

        Args:
            in_flight: Whether requests may be in flight. They are paused, and continue with the new weights.

        Raises:
            EngineError: The engine is asleep, or requests are in flight and may not be.
        """
        self._check_awake()
        if not in_flight:
            self._check_idle("weights change only between requests")
            yield
            return
        async with self._loading:
            await self._wait_until_resumed()
            await self._pause()
            yield
            await self._resume()

    async def fall_asleep(self) -> None:
        """Refuses requests and loads until `wake_up`.

        Raises:
            EngineError: Requests are in flight.
        """
        self._check_idle("the engine sleeps only between requests")
        await self._wait_until_resumed()  # else the scheduler would start without its memory
        self._is_asleep = True

    def wake_up(self) -> None:
        """Admits requests and loads again."""
        self._is_asleep = False

    def _check_awake(self) -> None:
        if self._is_asleep:
            raise EngineError("the engine is asleep: call wake first")

    def _check_idle(self, rule: str) -> None:
        if self._num_in_flight:
            raise EngineError(f"{self._num_in_flight} requests are in flight: {rule}")

    async def _pause_in_time(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._pause(), MAX_SETTLE_S)

    async def _resume_when_settled(self, paused: "asyncio.Future[None]") -> None:
        await asyncio.shield(paused)
        for _ in range(round(MAX_SETTLE_S / SETTLE_S)):
            num_in_flight = self._num_in_flight
            await asyncio.sleep(SETTLE_S)
            if self._num_in_flight == num_in_flight:
                break
        with suppress(TimeoutError):
            await asyncio.wait_for(self._resume(), MAX_SETTLE_S)

    async def _wait_until_resumed(self) -> None:
        if self._resumed is not None:
            await asyncio.wait([self._resumed])
