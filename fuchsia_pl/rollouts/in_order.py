"""Samples the rows of a file with many in flight, and returns them in the order of the file."""

import asyncio
from collections import deque
from dataclasses import dataclass, replace
from functools import partial

from fuchsia_pl.engines.base import Engine
from fuchsia_pl.rollouts.addressing import derived_seed
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.restarts import sampled_by
from fuchsia_pl.samples import Evaluation
from fuchsia_pl.types import Rollout

ROLLOUTS_IN_FLIGHT = 256  # as many as vLLM computes at the same time by default
# Rows that may be sampled before the first of them is done, in units of those in flight. It bounds the memory of finished ones.
WINDOW = 8


@dataclass(frozen=True)
class Answers(Evaluation):
    """The rollouts of one row of a file.

    Attributes:
        index: Position of the row; None if this rank has no row left.
        seeds: Seed of the first turn of each rollout. Without rollouts, the prompt of the row was too long.
        max_turns: Most turns of a rollout.

    >>> Answers((), {}, index=3).seeds
    ()
    """

    index: int | None = None
    seeds: tuple[int, ...] = ()
    max_turns: int = 1


class InOrder:
    """Samples the rows of a draw. A row that takes long delays the rows after it only when the window is full.

    Args:
        engine: The engine of the collector. If it is lost, the rows in flight are sampled again with the same seeds.
        collector: Runs the rollouts.
        draw: The rows in order, `draw.indices`.
    """

    def __init__(self, engine: Engine, collector: Collector, draw: Draw) -> None:
        self._engine, self._collector, self._draw = engine, collector, draw
        self._waiting = deque(draw.indices)
        self._tasks: deque[asyncio.Task[list[Rollout]]] = deque()
        num_in_flight = max(ROLLOUTS_IN_FLIGHT // draw.siblings, 1)
        self._slots, self._window = asyncio.Semaphore(num_in_flight), WINDOW * num_in_flight

    async def take(self) -> list[Rollout]:
        """The rollouts of the next row. The errors are those of `Collector.collect`."""
        while self._waiting and len(self._tasks) < self._window:
            self._tasks.append(asyncio.create_task(self._sampled(self._waiting.popleft())))
        try:
            rollouts = await self._tasks[0]
        except Exception:  # any error: no sampling of other rows may continue
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            raise
        self._tasks.popleft()
        return rollouts

    def seeds(self, index: int) -> tuple[int, ...]:
        """Seeds of the first turns of a row's rollouts."""
        return tuple(derived_seed(*self._draw.address, index, sibling) for sibling in range(self._draw.siblings))

    async def _sampled(self, index: int) -> list[Rollout]:
        async with self._slots:
            draw = replace(self._draw, indices=[index])
            (rollouts,) = await sampled_by(self._engine, partial(self._collector.collect, draw))
            return rollouts
