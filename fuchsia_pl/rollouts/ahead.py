"""Sampling beside training: phases of rollouts are begun before they are asked for, on an event loop of its own."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, TypeVar

from fuchsia_pl.loop import LoopThread

T = TypeVar("T")
GO_ON_TIMEOUT_S = 60.0
CANCEL_TIMEOUT_S = 60.0


def call(wait: Callable[[], None]) -> None:
    """Waits."""
    wait()


class PhasesAhead(Generic[T]):
    """Samples phases one after the other, up to some of them before their turn.

    When phase p is asked for, phases up to p + `num_ahead` are begun, so that they are sampled while p is trained, with
    weights at most `num_ahead` phases old. 0 begins a phase when it is asked for.

    Args:
        loop: Where it runs.
        sample: Samples a phase.
        num_ahead: Phases begun before they are asked for.
        num_phases: The run's last phase is the one before this; none is begun for nothing. None: there is no last.
    """

    def __init__(
        self, loop: LoopThread, sample: Callable[[int], Awaitable[T]], num_ahead: int, num_phases: int | None
    ) -> None:
        self._loop = loop
        self._sample = sample
        self._num_ahead = num_ahead
        self._num_phases = num_phases
        self._begun: dict[int, Future[T]] = {}
        self._lock, self._may_start, self._idle = asyncio.Lock(), asyncio.Event(), asyncio.Event()
        self._may_start.set()
        self._idle.set()

    def take(self, phase: int) -> T:
        """Begins what may begin now and waits for a phase. Earlier ones that nobody took are dropped."""
        for passed in [begun for begun in self._begun if begun < phase]:
            self._begun.pop(passed).cancel()
        last = phase + self._num_ahead
        if self._num_phases is not None:
            last = max(min(last, self._num_phases - 1), phase)
        for number in range(phase, last + 1):
            if number not in self._begun:
                self._begun[number] = self._loop.submit(self._sample_alone(number))
        future = self._begun[phase]
        try:
            result = future.result()  # everything that is awaited in there has a bound of its own
        except BaseException:  # whatever ends the wait, nothing is to go on behind it
            future.cancel()
            raise
        del self._begun[phase]
        return result

    @contextmanager
    def paused(self, waited: Callable[[Callable[[], None]], None] = call) -> Iterator[None]:
        """Waits for the phase that is being sampled, and lets none begin inside the `with` block.

        Args:
            waited: Calls the function that waits, and may put an end to it.
        """
        waited(lambda: self._loop.run(self._pause(), None))  # as long as the rest of a phase takes
        try:
            yield
        finally:
            self._loop.run(self._go_on(), GO_ON_TIMEOUT_S)

    async def cancel(self) -> None:
        """Cancels what was begun and waits for what that does on its way out. Called on the loop."""
        for future in self._begun.values():
            future.cancel()
        await asyncio.sleep(0)  # the futures are of other threads, and pass it on to the loop
        await asyncio.wait_for(self._idle.wait(), CANCEL_TIMEOUT_S)

    async def _sample_alone(self, phase: int) -> T:
        async with self._lock:
            await self._may_start.wait()  # as long as `paused` lasts, a load of weights
            self._idle.clear()
            try:
                return await self._sample(phase)
            finally:
                self._idle.set()

    async def _pause(self) -> None:
        self._may_start.clear()
        await self._idle.wait()

    async def _go_on(self) -> None:
        self._may_start.set()
