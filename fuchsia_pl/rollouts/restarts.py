"""Samples rollouts again after the engine died."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fuchsia_pl.engines.base import Engine, EngineLostError

T = TypeVar("T")


async def sampled_by(engine: Engine, sample: Callable[[], Awaitable[T]]) -> T:
    """Calls `sample` until the engine does not die during the call, and returns its result.

    Everything is sampled again with the same seeds and in the same batches as at first. Single requests would be decoded in
    smaller batches, which changes the rounding.

    Args:
        engine: The engine. It limits the number of its restarts.
        sample: Samples from the beginning. It leaves no state behind if it fails.

    Raises:
        EngineError: The engine failed otherwise, or died more often than allowed.
    """
    while True:
        try:
            return await sample()
        except EngineLostError as lost:
            await engine.restart(lost)
