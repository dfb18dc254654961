"""Rollouts whose engine died under them are sampled again."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fuchsia_pl.engines.base import Engine, EngineLostError

T = TypeVar("T")


async def sampled_by(engine: Engine, sample: Callable[[], Awaitable[T]]) -> T:
    """What `sample` returns, from its first call that no death of the engine interrupts.

    All of it is sampled again, with the seeds and in the batches of the first attempt: single requests would be decoded
    beside fewer rows, which changes the rounding.

    Args:
        engine: Samples; it bounds how often it starts again.
        sample: Samples from the beginning and leaves nothing behind where it fails.

    Raises:
        EngineError: The engine failed otherwise, or died more often than it may.
    """
    while True:
        try:
            return await sample()
        except EngineLostError as lost:
            await engine.restart(lost)
