"""An engine that is started once for several evaluations."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fuchsia_pl.engines.base import Engine, EngineLostError, EngineSpec, SamplingParams
from fuchsia_pl.types import Completion


class KeptEngine(Engine):
    """Passes all calls to another engine but `close`, so that the engine runs until `end`.

    Args:
        engine: The engine.
        lora_rank: Largest rank of the adapters that it will load.
    """

    def __init__(self, engine: Engine, lora_rank: int) -> None:
        self.engine = engine
        self.lora_rank = lora_rank
        self._has_started = False

    @property
    def name(self) -> str:
        """That of the engine."""
        return self.engine.name

    @property
    def policy_version(self) -> int:
        """That of the engine."""
        return self.engine.policy_version

    @property
    def can_sleep(self) -> bool:
        """That of the engine."""
        return self.engine.can_sleep

    @property
    def kv_cache_bytes(self) -> int:
        """That of the engine."""
        return self.engine.kv_cache_bytes

    @property
    def weights_share(self) -> float:
        """That of the engine."""
        return self.engine.weights_share

    def start(self, spec: EngineSpec) -> None:
        """Starts the engine with room for the largest adapter. Returns at once if it runs."""
        if not self._has_started:
            self.engine.start(replace(spec, model=replace(spec.model, lora_rank=self.lora_rank)))
            self._has_started = True

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Samples one completion."""
        return await self.engine.generate(prompt_ids, sampling)

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Computes the log-probabilities of given ids."""
        return await self.engine.score(token_ids)

    async def load_weights(self, path: Path, version: int) -> None:
        """Uses other weights for all later requests."""
        await self.engine.load_weights(path, version)

    async def sleep(self) -> None:
        """Frees the device's memory for the trainer."""
        await self.engine.sleep()

    async def wake(self) -> None:
        """Allocates its memory again."""
        await self.engine.wake()

    async def restart(self, lost: EngineLostError) -> None:
        """Starts again with the weights that were loaded last."""
        await self.engine.restart(lost)

    def close(self) -> None:
        """Does nothing: an evaluation ends, and the next one continues with the engine."""

    def end(self) -> None:
        """Ends the engine."""
        self.engine.close()
