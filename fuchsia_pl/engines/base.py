"""The protocol between those who want completions and those who sample them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fuchsia_pl.types import Completion, ServedModel

VERSION_FILE = "policy_version"


class EngineError(RuntimeError):
    """The engine did not start, did not answer in time, or died. The message holds its own words."""


@dataclass(frozen=True)
class EngineSpec:
    """What the run tells an engine at its start.

    Attributes:
        model: What trainer and engine share.
        max_length: Longest prompt plus completion, in tokens.
        seed: The run's seed.
        log_file: Where the engine's own output goes.
    """

    model: ServedModel
    max_length: int
    seed: int
    log_file: Path


@dataclass(frozen=True)
class SamplingParams:
    """How one completion is sampled. What is not named here is always sent as its neutral value.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        max_tokens: Upper bound of the completion's length.
        seed: Seed of this one request.
        stop: Strings after which sampling ends. The tokens that spell them stay in the completion.
        stop_token_ids: Ids after which sampling ends, the end-of-turn tokens of the model.

    >>> SamplingParams(temperature=1.0, max_tokens=32, seed=7, stop_token_ids=(2,)).stop
    ()
    """

    temperature: float
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


class Engine(ABC):
    """Samples completions of ids with the newest weights it was given.

    Constructed from a config, which must be cheap; nothing runs before `start` or after `close`. All coroutines may be
    awaited from any event loop, end within a bounded time, and raise `EngineError`.
    """

    @property
    @abstractmethod
    def policy_version(self) -> int:
        """The optimizer step whose weights it samples from; -1 before the first `load_adapter`."""

    @abstractmethod
    def start(self, spec: EngineSpec) -> None:
        """Starts the engine, or returns at once if it runs."""

    @abstractmethod
    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Samples one completion."""

    @abstractmethod
    async def load_adapter(self, path: Path, version: int) -> None:
        """Makes what `Policy.save_trained` wrote to `path` the weights of all later requests."""

    @abstractmethod
    def close(self) -> None:
        """Ends the engine and everything it started, or returns at once if it does not run."""


class EngineOwner(Protocol):
    """Whoever has an engine: what callbacks know of the data module."""

    @property
    def engine(self) -> Engine:
        """The engine."""


def check_version_file(path: Path, version: int) -> None:
    """Refuses an adapter folder that was written for another version.

    Raises:
        EngineError: The folder's version file is missing or holds another version.
    """
    file = path / VERSION_FILE
    written = file.read_text() if file.exists() else "none"
    if written != str(version):
        raise EngineError(f"the adapter folder {path} holds version {written}, version {version} was asked for")
