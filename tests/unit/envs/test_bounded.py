import asyncio
import threading
import time

import pytest

from fuchsia_pl.envs.bounded import StrayError, call_bounded


def test_sync_and_async_functions_return_and_raise():
    async def double(value):
        return 2 * value

    def fail(value):
        raise KeyError(value)

    assert asyncio.run(call_bounded(double, 2, 1.0)) == 4
    assert asyncio.run(call_bounded(lambda value: value + 1, 2, 1.0)) == 3
    with pytest.raises(KeyError, match="2"):
        asyncio.run(call_bounded(fail, 2, 1.0))


def test_what_a_sync_function_returns_is_awaited_if_it_can_be():
    async def double(value):
        return 2 * value

    assert asyncio.run(call_bounded(lambda value: double(value), 2, 1.0)) == 4


def test_an_exhausted_iterator_is_told_at_once():
    start = time.perf_counter()
    with pytest.raises(StrayError, match="StopIteration"):
        asyncio.run(call_bounded(lambda _: next(iter(())), None, 20.0))
    assert time.perf_counter() - start < 5


def test_a_blocking_call_holds_up_nobody_else():
    async def both():
        start = time.perf_counter()
        await asyncio.gather(*(call_bounded(time.sleep, 0.3, 5.0) for _ in range(4)))
        return time.perf_counter() - start

    assert asyncio.run(both()) < 0.9  # one after the other they take 1.2 s


def test_a_call_that_hangs_ends_within_its_bound_and_does_not_hold_up_the_loops_end():
    release = threading.Event()
    start = time.perf_counter()
    with pytest.raises(TimeoutError):
        asyncio.run(call_bounded(lambda _: release.wait(30), None, 0.2))
    assert time.perf_counter() - start < 5
    release.set()


def test_a_cancellation_from_outside_stays_one():
    async def cancelled():
        task = asyncio.ensure_future(call_bounded(asyncio.sleep, 30, 60.0))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(cancelled())
