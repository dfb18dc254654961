import asyncio
import threading
import time

import pytest

from fuchsia_pl.envs import bounded
from fuchsia_pl.envs.bounded import LeftThreadsError, call_apart, call_bounded, call_in_thread
from fuchsia_pl.envs.user_code import StrayError


def test_sync_and_async_functions_return_and_raise():
    async def double(value):
        return 2 * value

    def fail(value):
        raise KeyError(value)

    assert asyncio.run(call_bounded(double, 2, 1.0)) == 4
    assert asyncio.run(call_bounded(lambda value: value + 1, 2, 1.0)) == 3
    with pytest.raises(KeyError, match="2"):
        asyncio.run(call_bounded(fail, 2, 1.0))


def test_an_awaitable_result_of_a_sync_function_is_awaited():
    async def double(value):
        return 2 * value

    assert asyncio.run(call_bounded(lambda value: double(value), 2, 1.0)) == 4


def test_stop_iteration_is_reported_immediately():
    start = time.perf_counter()
    with pytest.raises(StrayError, match="StopIteration"):
        asyncio.run(call_bounded(lambda _: next(iter(())), None, 20.0))
    assert time.perf_counter() - start < 15


def test_a_blocking_call_does_not_block_other_calls():
    barrier = threading.Barrier(4)  # which opens only if all four calls run

    async def all_four():
        await asyncio.gather(*(call_bounded(barrier.wait, 30, 60.0) for _ in range(4)))

    asyncio.run(all_four())


def test_a_hanging_call_ends_at_its_time_limit_and_does_not_block_the_end_of_the_loop():
    release = threading.Event()
    start = time.perf_counter()
    with pytest.raises(TimeoutError):
        asyncio.run(call_bounded(lambda _: release.wait(30), None, 0.2))
    assert time.perf_counter() - start < 15
    release.set()


def test_an_external_cancellation_is_propagated():
    async def cancelled():
        task = asyncio.ensure_future(call_bounded(asyncio.sleep, 30, 60.0))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(cancelled())


def test_threads_that_run_on_are_counted_and_too_many_end_the_run(monkeypatch):
    monkeypatch.setattr(bounded, "MAX_LEFT_THREADS", 2)
    release = threading.Event()

    def hang(_):
        release.wait(60)

    async def hang_and_call(number):
        for _ in range(number):
            with pytest.raises(TimeoutError):
                await call_bounded(hang, None, 0.05)
        return await call_bounded(lambda value: value, 7, 30.0)

    assert asyncio.run(hang_and_call(2)) == 7  # the allowed number
    with pytest.raises(
        LeftThreadsError, match=r"^3 abandoned calls still run .* 2 are allowed: 3 of \S+<locals>\.hang\."
    ):
        asyncio.run(hang_and_call(1))
    release.set()
    for thread in [thread for thread in threading.enumerate() if thread.name.endswith("hang")]:
        thread.join(30)
    assert asyncio.run(hang_and_call(0)) == 7  # what has ended is not counted


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["time is up", "cancelled from outside"])
def test_a_call_that_catches_its_cancellation_ends_at_its_time_limit_and_is_counted(monkeypatch, is_cancelled):
    monkeypatch.setattr(bounded, "MAX_LEFT_THREADS", 0)
    monkeypatch.setattr(bounded, "CANCEL_TIMEOUT_S", 0.05)

    async def stubborn(release):
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async def scenario():
        release = asyncio.Event()
        call = asyncio.ensure_future(call_bounded(stubborn, release, 60.0 if is_cancelled else 0.05))
        await asyncio.sleep(0.01)
        if is_cancelled:
            call.cancel()
        done, _ = await asyncio.wait([call], timeout=30)
        assert done == {call}
        assert call.cancelled() if is_cancelled else isinstance(call.exception(), TimeoutError)
        with pytest.raises(
            LeftThreadsError, match=r"^1 abandoned calls still run .* 0 are allowed: 1 of \S+<locals>\.stubborn\."
        ):
            await call_bounded(lambda value: value, 7, 30.0)
        release.set()
        await asyncio.sleep(0.05)
        return await call_bounded(lambda value: value, 7, 30.0)  # what has ended is not counted

    assert asyncio.run(scenario()) == 7


def test_a_call_that_is_cancelled_before_its_time_limit_is_not_counted(monkeypatch):
    monkeypatch.setattr(bounded, "MAX_LEFT_THREADS", 0)
    release = threading.Event()

    async def cancelled():
        future = call_in_thread(release.wait, 60, timeout_s=60.0)
        future.cancel()
        return await call_bounded(lambda value: value, 7, 30.0)

    assert asyncio.run(cancelled()) == 7
    release.set()


def test_threads_started_by_user_code_are_counted(monkeypatch):
    release = threading.Event()
    threads = [threading.Thread(target=release.wait, args=(60,), name=f"leak-{n}", daemon=True) for n in range(5)]
    monkeypatch.setattr(bounded, "MAX_OTHER_THREADS", 4)  # threads of earlier tests may end meanwhile
    for thread in threads:
        thread.start()
    with pytest.raises(LeftThreadsError, match="5 of leak-N"):
        asyncio.run(call_bounded(lambda value: value, 7, 30.0))
    release.set()
    for thread in threads:
        thread.join(30)


def test_call_apart_returns_raises_and_confines_an_exit():
    def leave(error):
        raise error

    assert call_apart(lambda: threading.current_thread() is threading.main_thread()) is False
    with pytest.raises(LookupError, match="no"):
        call_apart(leave, LookupError("no"))
    for error in (SystemExit(0), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()):
        with pytest.raises(StrayError, match=type(error).__name__):
            call_apart(leave, error)
