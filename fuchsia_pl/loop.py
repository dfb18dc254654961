"""An event loop in a thread of its own, for what lives longer than the loops that ask it, or runs beside training."""

import asyncio
import signal
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

STOP_TIMEOUT_S = 30.0


class LoopThread:
    """Runs coroutines on one event loop, whoever asks and from whatever loop.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._ended = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Starts a coroutine. A SystemExit or KeyboardInterrupt in it is code's own and becomes a RuntimeError."""
        return asyncio.run_coroutine_threadsafe(_contained(coroutine), self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        """Runs a coroutine to its end and blocks until then; it is cancelled where it takes too long or the wait is interrupted.

        Args:
            coroutine: What to run.
            timeout_s: Bound in seconds; None where everything that it awaits has one of its own.

        Raises:
            TimeoutError: It took longer.
        """
        future = self.submit(coroutine)
        try:
            return future.result(timeout_s)
        except BaseException:  # whatever ends the wait, nothing is to go on behind it
            future.cancel()
            raise

    async def call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Awaits a coroutine from another loop; one that takes too long, or whose caller is cancelled, is cancelled.

        Args:
            coroutine: What to run.
            timeout_s: Bound in seconds.

        Raises:
            TimeoutError: It took longer.
        """
        return await asyncio.wait_for(asyncio.wrap_future(self.submit(coroutine)), timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Ends the loop and the thread. A loop that does not come to its end in time is left to the daemon thread."""
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._loop.close()

    def _serve(self) -> None:
        # Inherited by what is started from here: Ctrl-C goes to all processes of a terminal, and those of a run are ended by it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        while not self._ended:
            # A task of user code that raises one of these ends `run_forever`, and whoever waits for another would wait forever.
            with suppress(SystemExit, KeyboardInterrupt):
                self._loop.run_forever()

    def _end(self) -> None:
        self._ended = True
        self._loop.stop()


async def _contained(coroutine: Coroutine[Any, Any, T]) -> T:
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"code on the event loop raised {type(error).__name__}: {error}") from error


async def cancel_others(timeout_s: float) -> None:
    """Cancels every other task of the running loop and waits for them.

    Args:
        timeout_s: Bound in seconds.
    """
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=timeout_s)


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end on a loop of its own, in a thread of its own.

    `asyncio.run` fails where the caller's thread runs an event loop, as in a notebook cell.

    Args:
        coroutine: What to run. Whatever it awaits has a time limit of its own.

    >>> async def caller():
    ...     return run_blocking(asyncio.sleep(0, "slept"))
    >>> asyncio.run(caller())
    'slept'
    """
    thread = LoopThread("once")
    try:
        return thread.run(_with_its_tasks(coroutine), None)
    finally:
        thread.stop(STOP_TIMEOUT_S)


async def _with_its_tasks(coroutine: Coroutine[Any, Any, T]) -> T:
    try:
        return await coroutine
    finally:
        await cancel_others(STOP_TIMEOUT_S)
