"""Confines exceptions of user code, and its attempts to end the process, to its call.

An environment, a reward function or a tool may call `sys.exit`, raise KeyboardInterrupt, or call `os._exit(0)`. Any of these
would end an event loop that other code waits for, or end a run with the exit code of success.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")
# Functions that end or replace this process without an exception.
ENDS = ("_exit", "execv", "execve")
FAILED = 1  # exit code instead of 0
# Id of the process in which user code runs in this context. A forked child has another id and may end itself.
_running_in: ContextVar[int] = ContextVar("running_in", default=0)
_must_end_by_themselves: set[int] = set()


class StrayError(RuntimeError):
    """User code raised an exception that would end the process, cancel the waiting task or look like its time-out."""


def reason(error: BaseException) -> str:
    """Class and message of an error, in one text.

    >>> reason(KeyError("answer")), reason(StrayError("SystemExit: 1")), reason(KeyboardInterrupt())
    ("KeyError: 'answer'", 'SystemExit: 1', 'KeyboardInterrupt')
    """
    if isinstance(error, StrayError):
        return str(error)
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def user_code(where: str = "") -> Iterator[None]:
    """Context for calls of sync user code.

    In the main thread a KeyboardInterrupt passes, since the user may have pressed Ctrl-C. A handler of another signal may
    raise there too, so long calls use `bounded.call_apart`.

    Args:
        where: Name of the code, for the message.

    Raises:
        StrayError: It raised SystemExit or another exception that is not a plain error, or tried to end the process.

    >>> with user_code("MyEnvironment.is_correct"):
    ...     raise SystemExit(0)
    Traceback (most recent call last):
    fuchsia_pl.envs.user_code.StrayError: MyEnvironment.is_correct raised SystemExit: 0
    """
    token = _enter()
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        raise StrayError(f"{where} raised {reason(error)}" if where else reason(error)) from error
    finally:
        _running_in.reset(token)


async def contained(awaitable: Awaitable[T]) -> T:
    """Awaits user code. A SystemExit raised by a task would end the event loop, and other tasks would wait forever.

    Raises:
        StrayError: It raised an exception that is not a plain error, which is chained.
    """
    token = _enter()
    try:
        return await awaitable
    except GeneratorExit:  # the coroutine is discarded
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
    finally:
        with suppress(ValueError):  # a discarded coroutine ends in another context
            _running_in.reset(token)


@contextmanager
def ends_by_itself() -> Iterator[None]:
    """Context in which a call of `os._exit(0)` ends this process with exit code 1 and one line."""
    process = os.getpid()
    _guard_ends()
    _must_end_by_themselves.add(process)
    try:
        yield
    finally:
        _must_end_by_themselves.discard(process)


def is_success(status: object) -> bool:
    """Whether this exit status means success: the system keeps eight bits of it.

    >>> is_success(None), is_success(0), is_success(256), is_success(1), is_success("gone")
    (True, True, True, False, False)
    """
    return status is None or (isinstance(status, int) and status % 256 == 0)


def _enter() -> "Token[int]":
    _guard_ends()
    return _running_in.set(os.getpid())


def _guard_ends() -> None:
    for name in ENDS:
        end = getattr(os, name)
        if not hasattr(end, "__wrapped__"):
            setattr(os, name, _guarded(name, end))


def _guarded(name: str, end: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the function: it raises SystemExit if user code calls it."""

    @wraps(end)
    def guarded(*arguments: Any, **named: Any) -> Any:
        status = named.get("status", arguments[0] if arguments else None) if name == "_exit" else 1
        if _running_in.get() == os.getpid():
            raise SystemExit(f"os._exit({status})" if name == "_exit" else f"os.{name}")
        if os.getpid() in _must_end_by_themselves and is_success(status):
            sys.stderr.write(
                f"error: some code called os._exit({status}) before the run ended, so the exit code is {FAILED}: a run that did "
                "not end by itself did not succeed\n"
            )
            sys.stderr.flush()
            return end(FAILED)
        return end(*arguments, **named)

    return guarded
