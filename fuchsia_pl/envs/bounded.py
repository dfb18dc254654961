"""Calls of user code, sync or async, that stall nobody else and end within a bound."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


class StrayError(RuntimeError):
    """User code raised what has a meaning of its own for whoever waits: an end of the process, a cancellation, a time-out."""


async def call_bounded(function: Callable[..., Any], argument: Any, timeout_s: float) -> Any:
    """Calls `function(argument)`; a sync function runs in a thread, and what it returns is awaited if it can be.

    Raises:
        TimeoutError: It took longer than `timeout_s`. A thread cannot be ended, so it may run on until the process ends.
        StrayError: It raised SystemExit, KeyboardInterrupt, another base exception, or a TimeoutError of its own.
    """
    return await asyncio.wait_for(contained(_call(function, argument)), timeout_s)


async def contained(awaitable: Awaitable[T]) -> T:
    """Awaits user code. A SystemExit that left a task would end the event loop, and whoever waits would wait forever.

    Raises:
        StrayError: It raised what is no plain error; that is chained.
    """
    try:
        return await awaitable
    except GeneratorExit:  # the coroutine is thrown away
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise StrayError(reason(error)) from error
    except TimeoutError as error:
        raise StrayError(reason(error)) from error
    except Exception:
        raise
    except BaseException as error:
        raise StrayError(reason(error)) from error


def reason(error: BaseException) -> str:
    """The name of an error and what it is about, in one text.

    >>> reason(KeyError("answer")), reason(StrayError("SystemExit: 1")), reason(KeyboardInterrupt())
    ("KeyError: 'answer'", 'SystemExit: 1', 'KeyboardInterrupt')
    """
    if isinstance(error, StrayError):
        return str(error)
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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
            failure = StrayError(reason(error))
            failure.__cause__ = error
        except BaseException as error:  # handed to the waiting coroutine whatever it is, or that would wait in vain
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, name=f"bounded-{function}", daemon=True).start()
    return future
