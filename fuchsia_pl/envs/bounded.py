"""Calls user code, sync or async, with a time limit and without blocking other rollouts."""

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
from fuchsia_pl.types import RunEndingConfigError

T = TypeVar("T")
# Limit of threads and coroutines that still run although their call was abandoned after its time limit.
MAX_LEFT_THREADS = 64
# Limit of all other threads of the process. A run has some dozens; many more are threads that user code started and left.
MAX_OTHER_THREADS = 1000
NUM_NAMED = 3
CANCEL_TIMEOUT_S = 2.0  # grace time in which a cancelled coroutine may clean up
# Name of the function of each thread, and its deadline in seconds of the monotonic clock.
_running: dict[threading.Thread, tuple[str, float]] = {}
_left_tasks: dict[asyncio.Future[Any], str] = {}  # cancelled tasks that still run, with the name of their function


class LeftThreadsError(RuntimeError):
    """Too many abandoned calls of user code still run. Ends the run, with any value of `on_error`."""


# Errors of user code that end a run whatever `on_error` is.
ENDS_RUN = (LeftThreadsError, RunEndingConfigError)


async def call_bounded(function: Callable[..., Any], argument: Any, timeout_s: float) -> Any:
    """Calls `function(argument)`. A sync function runs in a thread; an awaitable result is awaited.

    An async function shares the event loop with all other rollouts: code in an `async def` that blocks without an `await`, such
    as `time.sleep` or a request of a sync library, blocks all of them, and no time limit applies. Make such a function sync.

    Raises:
        TimeoutError: It took longer than `timeout_s`. A thread, or a coroutine that catches its cancellation, cannot be
            stopped and may run until the process ends.
        StrayError: It raised SystemExit, KeyboardInterrupt, another base exception, or its own TimeoutError.
        LeftThreadsError: Too many earlier calls still run.
    """
    check_left_threads()
    return await await_bounded(_call(function, argument, timeout_s), name_of(function), timeout_s)


async def await_bounded(awaitable: Awaitable[T], name: str, timeout_s: float) -> T:
    """Awaits user code. Unlike `asyncio.wait_for`, this returns even if the code ignores its cancellation.

    Args:
        awaitable: The awaitable.
        name: Name of the called function, for the list of abandoned calls.
        timeout_s: Time limit in seconds.

    Raises:
        TimeoutError: It took longer.
        StrayError: It raised an exception that is not a plain error.
    """
    task = asyncio.ensure_future(contained(awaitable))
    try:
        await asyncio.wait([task], timeout=timeout_s)
    except asyncio.CancelledError:
        await cancel_bounded(task, name)
        raise
    if not task.done():
        await cancel_bounded(task, name)
        raise TimeoutError
    return task.result()


async def cancel_bounded(task: "asyncio.Future[Any]", name: str) -> None:
    """Cancels a task of user code and waits for its end, at most `CANCEL_TIMEOUT_S`. A task that goes on counts as abandoned.

    Args:
        task: The task.
        name: Name of the called function, for the list of abandoned calls.
    """

    def forget(done: "asyncio.Future[Any]") -> None:
        _left_tasks.pop(done, None)
        if not done.cancelled():
            done.exception()  # no task waits for it, and asyncio would log the exception

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

    Threads of an executor are joined at the end of the event loop or of the interpreter, so a call that hangs would block
    the end of the run.

    Args:
        function: The function.
        arguments: Its arguments.
        timeout_s: Seconds after which the caller abandons the call; the thread then counts as abandoned.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():  # the waiting coroutine has abandoned the call
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
        except StopIteration as error:  # if awaited, it would end a coroutine silently
            failure = StrayError(reason(error))
            failure.__cause__ = error
        except BaseException as error:  # passed to the waiting coroutine, which would otherwise wait forever
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
    except RuntimeError:  # the system has no more threads
        _running.pop(thread)
        raise
    return future


def call_apart(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function that contains user code in another thread and waits for its end, without a time limit.

    In the main thread, an exception raised by a signal handler could not be distinguished from one raised by user code. Here
    it ends only the wait.

    Args:
        function: The function.
        arguments: Its arguments.

    Raises:
        StrayError: It raised an exception that is not a plain error.

    >>> call_apart(max, 3, 4)
    4
    """
    done: Future[T] = Future()

    def work() -> None:
        try:
            with user_code():
                result = function(*arguments)
        except BaseException as error:  # passed to the waiting thread
            done.set_exception(error)
        else:
            done.set_result(result)

    threading.Thread(target=work, name="apart", daemon=True).start()
    return done.result()


def check_left_threads() -> None:
    """Counts the abandoned threads and coroutines of user code.

    Raises:
        LeftThreadsError: There are too many; their functions are named.
    """
    now = time.monotonic()
    left = Counter([name for name, end in list(_running.values()) if end < now])
    left.update(list(_left_tasks.values()))
    if left.total() > MAX_LEFT_THREADS:
        raise LeftThreadsError(
            f"{left.total()} abandoned calls still run after their time limit, and {MAX_LEFT_THREADS} are allowed: "
            f"{_most(left)}. Neither a thread nor a coroutine that catches its cancellation can be stopped: give these "
            "functions their own time limit, or run them in processes"
        )
    others = threading.active_count() - len(_running)
    if others > MAX_OTHER_THREADS:
        names = Counter(re.sub(r"\d+", "N", thread.name) for thread in threading.enumerate())
        raise LeftThreadsError(
            f"this process has {others} threads beside the bounded calls of user code, and {MAX_OTHER_THREADS} are allowed: "
            f"{_most(names)}. User code starts threads that never end: join them, or use one pool for all calls"
        )


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function in messages.

    >>> name_of(partial(max, 1))
    'max'
    """
    inner = function.func if isinstance(function, partial) else function
    return inner.__qualname__ if hasattr(inner, "__qualname__") else type(inner).__qualname__


def _most(counted: "Counter[str]") -> str:
    return ", ".join(f"{number} of {name}" for name, number in counted.most_common(NUM_NAMED))
