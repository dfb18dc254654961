import asyncio
import threading
import time
from concurrent.futures import CancelledError

import pytest

from fuchsia_pl.loop import LoopThread
from fuchsia_pl.rollouts.ahead import PhasesAhead
from fuchsia_pl.stopping import Stopped


@pytest.fixture
def loop():
    made = LoopThread("rollouts")
    yield made
    made.stop(5)


def wait_for(log: "Log", event: str) -> None:
    """Waits until an event is recorded, however busy the machine is."""
    end = time.monotonic() + 30
    while event not in log.events and time.monotonic() < end:
        time.sleep(0.005)


class Log:
    """Records the starts and ends of phases, in order; each phase takes a short time."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds
        self.events: list[str] = []

    async def sample(self, phase: int) -> int:
        self.events.append(f"begin {phase}")
        await asyncio.sleep(self.seconds)
        self.events.append(f"end {phase}")
        return 10 * phase


def test_without_phases_ahead_each_begins_when_it_is_asked_for(loop):
    log = Log()
    phases = PhasesAhead(loop, log.sample, num_ahead=0, num_phases=None)
    assert [phases.take(phase) for phase in (0, 1)] == [0, 10]
    time.sleep(0.1)
    assert log.events == ["begin 0", "end 0", "begin 1", "end 1"]


def test_phases_ahead_are_begun_one_after_the_other_and_none_beyond_the_last(loop):
    log = Log()
    phases = PhasesAhead(loop, log.sample, num_ahead=2, num_phases=3)
    assert phases.take(0) == 0
    wait_for(log, "end 2")
    assert log.events == [f"{what} {phase}" for phase in (0, 1, 2) for what in ("begin", "end")]
    assert [phases.take(phase) for phase in (1, 2)] == [10, 20]
    time.sleep(0.1)
    assert len(log.events) == 6


def test_a_pause_waits_for_the_phase_that_runs_and_lets_none_begin(loop):
    log = Log(seconds=0.5)
    phases = PhasesAhead(loop, log.sample, num_ahead=2, num_phases=None)
    phases.take(0)
    wait_for(log, "begin 1")
    with phases.paused():
        assert log.events == ["begin 0", "end 0", "begin 1", "end 1"]
        time.sleep(0.7)
        assert log.events[-1] == "end 1"
    assert phases.take(2) == 20


def test_a_pause_that_is_given_up_is_none(loop):
    def give_up(wait):
        raise Stopped(15)

    phases = PhasesAhead(loop, Log().sample, num_ahead=1, num_phases=None)
    phases.take(0)
    with pytest.raises(Stopped), phases.paused(give_up):
        raise AssertionError
    loop.run(phases.cancel(), 5)


def test_phases_that_nobody_took_are_dropped(loop):
    """A run that continues at a later phase."""
    log = Log()

    async def slow_when_nobody_wants_it(phase: int) -> int:
        log.seconds = 60 if phase == 1 else 0.05
        return await log.sample(phase)

    phases = PhasesAhead(loop, slow_when_nobody_wants_it, num_ahead=1, num_phases=None)
    assert phases.take(0) == 0
    wait_for(log, "begin 1")
    assert log.events[-1] == "begin 1"
    begin = time.perf_counter()
    assert phases.take(5) == 50
    assert time.perf_counter() - begin < 10
    assert "end 1" not in log.events


def test_what_fails_ahead_is_told_when_its_turn_comes(loop):
    async def sample(phase: int) -> int:
        if phase == 1:
            raise ValueError("phase 1 fails")
        return phase

    phases = PhasesAhead(loop, sample, num_ahead=1, num_phases=None)
    assert phases.take(0) == 0
    with pytest.raises(ValueError, match="phase 1 fails"):
        phases.take(1)


def test_cancelling_ends_what_runs_and_begins_nothing_more(loop):
    log, ended = Log(seconds=60.0), []

    async def sample(phase: int) -> int:
        try:
            return await log.sample(phase)
        finally:
            await asyncio.sleep(0.05)
            ended.append(phase)

    phases = PhasesAhead(loop, sample, num_ahead=2, num_phases=None)

    def cancel() -> None:
        wait_for(log, "begin 0")
        loop.run(phases.cancel(), 30.0)

    threading.Thread(target=cancel).start()
    start = time.perf_counter()
    with pytest.raises(CancelledError):
        phases.take(0)
    end = time.monotonic() + 30
    while not ended and time.monotonic() < end:
        time.sleep(0.005)
    assert time.perf_counter() - start < 30
    assert (log.events, ended) == (["begin 0"], [0])
