"""`BurstGate`: which requests the engine schedules together, and when its weights and its memory may change."""

import asyncio
import time

import pytest

from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.engines.burst import BurstGate


class Scheduler:
    """Records its calls. `answers` is False for a dead engine, which never returns."""

    def __init__(self, answers: bool = True) -> None:
        self.calls: list[str] = []
        self.answers = answers
        self.gate = BurstGate(self.pause, self.resume)

    async def pause(self) -> None:
        await self._call("pause")

    async def resume(self) -> None:
        await self._call("resume")

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        await asyncio.sleep(0 if self.answers else 600)

    async def run(self, name: str, seconds: float = 0.0, delay_s: float = 0.0) -> None:
        await asyncio.sleep(delay_s)
        async with self.gate.request():
            self.calls.append(name)
            await asyncio.sleep(seconds)


def run(scenario, **settings) -> list[str]:
    async def on_a_loop():
        scheduler = Scheduler(**settings)
        await scenario(scheduler)
        return scheduler.calls

    return asyncio.run(on_a_loop())


def test_the_scheduler_is_paused_until_the_burst_is_complete():
    async def burst(scheduler):
        delays = [0.0, 0.005, 0.015]  # each within 20 ms of the one before
        await asyncio.gather(*(scheduler.run(str(n), 0.2, delay) for n, delay in enumerate(delays)))

    assert run(burst) == ["pause", "0", "1", "2", "resume"]


def test_a_request_beside_others_waits_for_no_burst_and_the_next_burst_pauses_again():
    async def two_bursts(scheduler):
        await asyncio.gather(scheduler.run("first", 0.2), scheduler.run("late", 0.0, delay_s=0.1))
        await scheduler.run("second", 0.1)

    assert run(two_bursts) == ["pause", "first", "resume", "late", "pause", "second", "resume"]


def test_weights_do_not_change_while_requests_are_in_flight():
    async def load_beside_a_request(scheduler):
        request = asyncio.ensure_future(scheduler.run("request", 0.1))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineError, match="1 requests are in flight: weights change only between requests"):
            async with scheduler.gate.load(in_flight=False):
                raise AssertionError("the block ran")
        with pytest.raises(EngineError, match="1 requests are in flight: the engine sleeps only between requests"):
            await scheduler.gate.fall_asleep()
        await request
        async with scheduler.gate.load(in_flight=False):
            scheduler.calls.append("load")

    assert run(load_beside_a_request) == ["pause", "request", "resume", "load"]


def test_a_load_with_requests_in_flight_pauses_them_and_holds_back_new_ones():
    async def load_in_flight(scheduler):
        request = asyncio.ensure_future(scheduler.run("request", 0.3))
        await asyncio.sleep(0.005)  # the burst is not complete: the load waits for it
        async with scheduler.gate.load(in_flight=True):
            late = asyncio.ensure_future(scheduler.run("late"))
            await asyncio.sleep(0.05)
            scheduler.calls.append("load")
        await asyncio.gather(request, late)

    assert run(load_in_flight) == ["pause", "request", "resume", "pause", "load", "resume", "late"]


def test_a_sleeping_engine_refuses_requests_and_loads():
    async def asleep(scheduler):
        await scheduler.run("before")
        await scheduler.gate.fall_asleep()
        assert scheduler.calls == ["pause", "before", "resume"]  # resumed before it sleeps
        with pytest.raises(EngineError, match="the engine is asleep: call wake first"):
            await scheduler.run("refused")
        with pytest.raises(EngineError, match="the engine is asleep: call wake first"):
            async with scheduler.gate.load(in_flight=False):
                raise AssertionError("the block ran")
        scheduler.gate.wake_up()
        await scheduler.run("after")

    assert run(asleep) == ["pause", "before", "resume", "pause", "after"]


def test_a_dead_engine_holds_a_request_for_a_bounded_time(monkeypatch):
    monkeypatch.setattr("fuchsia_pl.engines.burst.MAX_SETTLE_S", 0.1)
    begin = time.perf_counter()
    assert run(lambda scheduler: scheduler.run("request"), answers=False) == ["pause", "request"]
    assert time.perf_counter() - begin < 30  # the pause never ends


def test_a_request_that_fails_is_no_longer_in_flight():
    async def failing(scheduler):
        with pytest.raises(RuntimeError, match="failed"):
            async with scheduler.gate.request():
                raise RuntimeError("failed")
        async with scheduler.gate.load(in_flight=False):
            scheduler.calls.append("load")

    assert run(failing)[-1] == "load"
