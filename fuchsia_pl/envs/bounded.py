"""Calls of user code, sync or async, that stall nobody else and end within a bound."""

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any


async def call_bounded(function: Callable[..., Any], argument: Any, timeout_s: float) -> Any:
    """Calls `function(argument)`; a sync function runs in a thread, and what it returns is awaited if it can be.

    Raises:
        TimeoutError: It took longer than `timeout_s`. A thread cannot be ended, so it may run on until the process ends.
    """
    return await asyncio.wait_for(_call(function, argument), timeout_s)


async def _call(function: Callable[..., Any], argument: Any) -> Any:
    result = function(argument) if inspect.iscoroutinefunction(function) else await call_in_thread(function, argument)
    return await result if inspect.isawaitable(result) else result


def call_in_thread(function: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":
    """Runs a sync function in a daemon thread.

    An executor's threads are joined when the event loop or the interpreter ends, so with one of those a call that hangs
    would hang the run after its time was up.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():  # the waiting coroutine gave up
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = function(*arguments)
        except StopIteration as error:  # no future takes one: it would end a generator somewhere else
            failure = RuntimeError(f"{function} raised StopIteration")
            failure.__cause__ = error
        except BaseException as error:  # handed to the waiting coroutine whatever it is, or that would wait in vain
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, name=f"bounded-{function}", daemon=True).start()
    return future
