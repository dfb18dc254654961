"""An event loop in its own thread, for coroutines that outlive the caller's loop or run during training."""

import asyncio
import signal
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

START_TIMEOUT_S = STOP_TIMEOUT_S = 30.0


class LoopThread:
    """Runs coroutines of any thread or event loop on one event loop.

    Args:
        name: Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._ended = False
        # Made in the thread: a signal, which raises in the main thread, would leave a half-made loop that cannot be closed.
        made: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._serve, args=(made,), name=name, daemon=True)
        self._thread.start()
        self._loop = made.result(START_TIMEOUT_S)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Starts a coroutine. A SystemExit or KeyboardInterrupt that it raises becomes a RuntimeError."""
        return asyncio.run_coroutine_threadsafe(_contained(coroutine), self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        """Runs a coroutine and blocks until it ends. A timeout or an interrupted wait cancels it.

        Args:
            coroutine: The coroutine.
            timeout_s: Limit in seconds. None is for coroutines whose awaits all have limits.

        Raises:
            TimeoutError: The coroutine took longer.
        """
        future = self.submit(coroutine)
        try:
            return future.result(timeout_s)
        except BaseException:  # after any error, the coroutine must not continue in the background
            future.cancel()
            raise

    async def call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Awaits a coroutine from another event loop. A timeout or the caller's cancellation cancels it.

        Args:
            coroutine: The coroutine.
            timeout_s: Limit in seconds.

        Raises:
            TimeoutError: The coroutine took longer.
        """
        return await asyncio.wait_for(asyncio.wrap_future(self.submit(coroutine)), timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Stops the loop and the thread. A loop that does not stop in time remains in its daemon thread."""
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._loop.close()

    def _serve(self, made: "Future[asyncio.AbstractEventLoop]") -> None:
        # Child processes inherit the mask: Ctrl-C signals all processes of a terminal, and the run ends its children itself.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            loop = asyncio.new_event_loop()
        except OSError as error:  # no descriptor is left
            made.set_exception(error)
            return
        made.set_result(loop)
        while not self._ended:
            # A task of user code that raises one of these ends `run_forever`; the other tasks would then never finish.
            with suppress(SystemExit, KeyboardInterrupt):
                loop.run_forever()

    def _end(self) -> None:
        self._ended = True
        self._loop.stop()


async def _contained(coroutine: Coroutine[Any, Any, T]) -> T:
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"code on the event loop raised {type(error).__name__}: {error}") from error


async def cancel_others(timeout_s: float) -> None:
    """Cancels every other task of the running loop and waits until they end.

    Args:
        timeout_s: Limit in seconds.
    """
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=timeout_s)


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on a new event loop in a new thread, and blocks until it ends.

    `asyncio.run` fails if the caller's thread runs an event loop, as in a notebook.

    Args:
        coroutine: The coroutine. Everything that it awaits must have a time limit.

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
