import asyncio
import threading

import pytest

from fuchsia_pl.loop import LoopThread, cancel_others


@pytest.fixture
def thread():
    made = LoopThread("test")
    yield made
    made.stop(5)


async def where() -> tuple[str, int]:
    return threading.current_thread().name, id(asyncio.get_running_loop())


def test_everybody_is_served_by_one_loop_in_its_own_thread(thread):
    asked = [thread.run(where(), 5), asyncio.run(thread.call(where(), 5)), asyncio.run(thread.call(where(), 5))]
    assert len(set(asked)) == 1
    assert asked[0][0] == "test"


@pytest.mark.parametrize("how", ["run", "call"])
def test_what_takes_too_long_is_cancelled(thread, how):
    ended = threading.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with pytest.raises(TimeoutError):
        thread.run(slow(), 0.05) if how == "run" else asyncio.run(thread.call(slow(), 0.05))
    assert ended.wait(5)


def test_errors_pass(thread):
    async def fail() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        thread.run(fail(), 5)
    with pytest.raises(LookupError, match="no"):
        asyncio.run(thread.call(fail(), 5))


def test_the_others_are_cancelled(thread):
    future = thread.submit(asyncio.sleep(60))
    thread.run(asyncio.sleep(0.05), 5)
    thread.run(cancel_others(5), 5)
    assert future.cancelled()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_code_that_would_end_the_process_ends_its_own_coroutine_alone(thread, error):
    async def leave() -> None:
        raise error(0)

    async def leave_in_a_task() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(leave())

    other = thread.submit(asyncio.sleep(0.2, "done"))
    for coroutine in (leave(), leave_in_a_task()):
        with pytest.raises(RuntimeError, match=f"raised {error.__name__}: 0"):
            thread.run(coroutine, 5)
    assert other.result(5) == "done"
