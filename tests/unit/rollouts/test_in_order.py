"""Rows are sampled with many in flight, returned in order, and bounded in number."""

import asyncio

import pytest

from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.rollouts import in_order
from fuchsia_pl.rollouts.collector import Draw
from fuchsia_pl.rollouts.in_order import InOrder


class Recorded:
    """Takes the place of a collector: a row's "rollouts" are its index. The first row waits for `opened`."""

    def __init__(self, failing=()) -> None:
        self.failing = failing
        self.opened = asyncio.Event()
        self.begun: list[int] = []
        self.running = self.most = 0

    async def collect(self, draw):
        (index,) = draw.indices
        self.begun.append(index)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await (self.opened.wait() if index == 0 else asyncio.sleep(0.001))
            if index in self.failing:
                raise EngineError(f"row {index}")
        finally:
            self.running -= 1
        return [[index]]


def draw(number: int, siblings: int) -> Draw:
    return Draw([{}] * number, list(range(number)), siblings, 1.0, (0, "predict"))


def test_a_slow_row_delays_no_row_of_its_window(monkeypatch):
    monkeypatch.setattr(in_order, "ROLLOUTS_IN_FLIGHT", 6)
    monkeypatch.setattr(in_order, "WINDOW", 4)

    async def taken():
        collector = Recorded()
        rows = InOrder(None, collector, draw(30, siblings=2))  # 3 rows in flight, a window of 12
        first = asyncio.create_task(rows.take())
        await asyncio.sleep(0.2)
        assert sorted(collector.begun) == list(range(12))
        assert not first.done()
        collector.opened.set()
        found = [await first, *[await rows.take() for _ in range(29)]]
        assert found == [[index] for index in range(30)]
        assert collector.most == 3

    asyncio.run(taken())


def test_an_error_ends_the_rows_in_flight():
    async def taken():
        collector = Recorded(failing=(1,))
        rows = InOrder(None, collector, draw(5, siblings=1))
        collector.opened.set()
        assert await rows.take() == [0]
        with pytest.raises(EngineError, match="row 1"):
            await rows.take()
        assert collector.running == 0

    asyncio.run(taken())
