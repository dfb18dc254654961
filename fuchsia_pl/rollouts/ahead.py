"""Sampling in parallel with training: phases of rollouts start before they are needed, on a separate event loop."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, TypeVar

from fuchsia_pl.loop import LoopThread

T = TypeVar("T")
CONTINUE_TIMEOUT_S = 60.0
CANCEL_TIMEOUT_S = 60.0


def call(wait: Callable[[], None]) -> None:
    """Calls a function that waits."""
    wait()


class PhasesAhead(Generic[T]):
    """Samples phases one after the other, and starts up to `num_ahead` of them before they are needed.

    When phase p is taken, all phases up to p + `num_ahead` are started. They are sampled while p is trained, with weights that
    are at most `num_ahead` phases old. With 0, a phase starts when it is taken.

    Args:
        loop: Event loop of the sampling.
        sample: Samples a phase.
        num_ahead: Phases that start before they are needed.
        num_phases: Number of phases of the run, None if it is not limited. No later phase is started.
    """

    def __init__(
        self, loop: LoopThread, sample: Callable[[int], Awaitable[T]], num_ahead: int, num_phases: int | None
    ) -> None:
        self._loop = loop
        self._sample = sample
        self._num_ahead = num_ahead
        self._num_phases = num_phases
        self._started: dict[int, Future[T]] = {}
        self._lock, self._may_start, self._idle = asyncio.Lock(), asyncio.Event(), asyncio.Event()
        self._may_start.set()
        self._idle.set()

    def take(self, phase: int) -> T:
        """Starts the phases that may start now, and waits for one of them. Earlier phases that were not taken are cancelled."""
        for passed in [started for started in self._started if started < phase]:
            self._started.pop(passed).cancel()
        last = phase + self._num_ahead
        if self._num_phases is not None:
            last = max(min(last, self._num_phases - 1), phase)
        for number in range(phase, last + 1):
            if number not in self._started:
                self._started[number] = self._loop.submit(self._sample_alone(number))
        future = self._started[phase]
        try:
            result = future.result()  # all awaited calls inside have time limits
        except BaseException:  # no sampling may continue after the wait has ended
            future.cancel()
            raise
        del self._started[phase]
        return result

    @contextmanager
    def paused(self, waited: Callable[[Callable[[], None]], None] = call) -> Iterator[None]:
        """Waits for the phase in progress. No phase starts inside the `with` block.

        Args:
            waited: Calls the function that waits, and may interrupt it.
        """
        waited(lambda: self._loop.run(self._pause(), None))  # for the rest of the phase
        try:
            yield
        finally:
            self._loop.run(self._continue(), CONTINUE_TIMEOUT_S)

    async def cancel(self) -> None:
        """Cancels all started phases and waits for their cleanup. Must be called on the loop."""
        for future in self._started.values():
            future.cancel()
        await asyncio.sleep(0)  # the futures pass the cancellation on to the loop
        await asyncio.wait_for(self._idle.wait(), CANCEL_TIMEOUT_S)

    async def _sample_alone(self, phase: int) -> T:
        async with self._lock:
            await self._may_start.wait()  # for the duration of `paused`
            self._idle.clear()
            try:
                return await self._sample(phase)
            finally:
                self._idle.set()

    async def _pause(self) -> None:
        self._may_start.clear()
        await self._idle.wait()

    async def _continue(self) -> None:
        self._may_start.set()
