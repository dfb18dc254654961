"""Calls of user code, sync or async, that stall nobody else and end within a bound."""

import asyncio
import inspect
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from fuchsia_pl.envs.user_code import StrayError, contained, reason, user_code

T = TypeVar("T")
# Threads, and coroutines, whose call was given up after its time limit and that run on all the same.
MAX_LEFT_THREADS = 64
# All other threads of the process: a run has some dozens, so so many more are threads that user code starts and leaves.
MAX_OTHER_THREADS = 1000
NUM_NAMED = 3
CANCEL_TIMEOUT_S = 2.0  # for what a coroutine does on its way out
# What each thread calls, and when its time is up in seconds of the monotonic clock.
_running: dict[threading.Thread, tuple[str, float]] = {}
_left_tasks: dict[asyncio.Future[Any], str] = {}  # that were cancelled and run on, and what each calls


class LeftThreadsError(RuntimeError):
    """User code leaves more and more calls behind that do not end. Ends the run, whatever `on_error` is."""


async def call_bounded(function: Callable[..., Any], argument: Any, timeout_s: float) -> Any:
    """Calls `function(argument)`; a sync function runs in a thread, and what it returns is awaited if it can be.

    An async function shares the event loop with all other rollouts: code in an `async def` that blocks without an `await`, such
    as `time.sleep` or a request of a sync library, holds up all of them, and no bound can end it. Make such a function sync.

    Raises:
        TimeoutError: It took longer than `timeout_s`. A thread cannot be ended, nor can a coroutine that catches its
            cancellation, so it may run on until the process ends.
        StrayError: It raised SystemExit, KeyboardInterrupt, another base exception, or a TimeoutError of its own.
        LeftThreadsError: Too many earlier calls still run.
    """
    check_left_threads()
    return await await_bounded(_call(function, argument, timeout_s), name_of(function), timeout_s)


async def await_bounded(awaitable: Awaitable[T], name: str, timeout_s: float) -> T:
    """Awaits user code. Unlike `asyncio.wait_for`, this ends too where the code catches its cancellation and goes on.

    Args:
        awaitable: What is awaited.
        name: Of what was called, for the count of what is left behind.
        timeout_s: Bound in seconds.

    Raises:
        TimeoutError: It took longer.
        StrayError: It raised what is no plain error.
    """
    task = asyncio.ensure_future(contained(awaitable))
    try:
        await asyncio.wait([task], timeout=timeout_s)
    except asyncio.CancelledError:
        await _cancel(task, name)
        raise
    if not task.done():
        await _cancel(task, name)
        raise TimeoutError
    return task.result()


async def _cancel(task: "asyncio.Future[Any]", name: str) -> None:
    def forget(done: "asyncio.Future[Any]") -> None:
        _left_tasks.pop(done, None)
        if not done.cancelled():
            done.exception()  # nobody waits for it, and asyncio would log it

    task.cancel()
    _left_tasks[task] = name
    task.add_done_callback(forget)
    await asyncio.wait([task], timeout=CANCEL_TIMEOUT_S)


async def _call(function: Callable[..., Any], argument: Any, timeout_s: float) -> Any:
    is_async = inspect.iscoroutinefunction(function)
    result = function(argument) if is_async else await call_in_thread(function, argument, timeout_s=timeout_s)
    return await result if inspect.isawaitable(result) else result


def call_in_thread(function: Callable[..., Any], *arguments: Any, timeout_s: float) -> "asyncio.Future[Any]":
    """Runs a sync function in a daemon thread.

    An executor's threads are joined when the event loop or the interpreter ends, so with one of those a call that hangs
    would hang the run after its time was up.

    Args:
        function: What is called.
        arguments: Its arguments.
        timeout_s: When the caller gives it up. This only counts the thread as left behind from then on.
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
            with user_code():
                result = function(*arguments)
        except StopIteration as error:  # awaited, it would end a coroutine in silence
            failure = StrayError(reason(error))
            failure.__cause__ = error
        except BaseException as error:  # handed to the waiting coroutine whatever it is, or that would wait in vain
            failure = error
        finally:
            _running.pop(threading.current_thread(), None)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    name = name_of(function)
    thread = threading.Thread(target=work, name=f"bounded-{name}", daemon=True)
    _running[thread] = name, time.monotonic() + timeout_s
    try:
        thread.start()
    except RuntimeError:  # the system has no more
        _running.pop(thread)
        raise
    return future


def call_apart(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function with user code in it outside of the calling thread, and waits for its end however long it takes.

    In the main thread, an exception of a signal handler could not be told from one that user code raises. Here it ends the
    wait alone.

    Args:
        function: What is called.
        arguments: Its arguments.

    Raises:
        StrayError: It raised what is no plain error.

    >>> call_apart(max, 3, 4)
    4
    """
    done: Future[T] = Future()

    def work() -> None:
        try:
            with user_code():
                result = function(*arguments)
        except BaseException as error:  # whoever waits gets it
            done.set_exception(error)
        else:
            done.set_result(result)

    threading.Thread(target=work, name="apart", daemon=True).start()
    return done.result()


def check_left_threads() -> None:
    """Counts the threads and the coroutines that user code left behind.

    Raises:
        LeftThreadsError: There are too many. The functions that they run are named.
    """
    now = time.monotonic()
    left = Counter([name for name, end in list(_running.values()) if end < now])
    left.update(list(_left_tasks.values()))
    if left.total() > MAX_LEFT_THREADS:
        raise LeftThreadsError(
            f"{left.total()} calls still run that were given up after their time limit, and {MAX_LEFT_THREADS} are allowed: "
            f"{_most(left)}. Neither a thread nor a coroutine that catches its cancellation can be ended from outside: give "
            "these functions a time limit of their own, or let them work in processes"
        )
    others = threading.active_count() - len(_running)
    if others > MAX_OTHER_THREADS:
        names = Counter(re.sub(r"\d+", "N", thread.name) for thread in threading.enumerate())
        raise LeftThreadsError(
            f"this process has {others} threads beside the bounded calls of user code, and {MAX_OTHER_THREADS} are allowed: "
            f"{_most(names)}. Some code starts threads that never end: join them, or use one pool for all calls"
        )


def name_of(function: Callable[..., Any]) -> str:
    """What messages call a function.

    >>> name_of(partial(max, 1))
    'max'
    """
    inner = function.func if isinstance(function, partial) else function
    return inner.__qualname__ if hasattr(inner, "__qualname__") else type(inner).__qualname__


def _most(counted: "Counter[str]") -> str:
    return ", ".join(f"{number} of {name}" for name, number in counted.most_common(NUM_NAMED))
