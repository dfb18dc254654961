"""The protocol between those who want completions and those who sample them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fuchsia_pl.types import Completion, ServedModel

VERSION_FILE = "policy_version"


class EngineError(RuntimeError):
    """The engine did not start, did not answer in time, or died. The message holds its own words."""


class EngineLostError(EngineError):
    """The engine's processes have ended.

    Args:
        message: What happened.
        start_number: Which start of the engine has ended, so that of several requests that fail only one restarts it.
    """

    def __init__(self, message: str, start_number: int) -> None:
        super().__init__(message)
        self.start_number = start_number


@dataclass(frozen=True)
class EngineSpec:
    """What the run tells an engine at its start.

    Attributes:
        model: What trainer and engine share.
        max_length: Longest prompt plus completion, in tokens.
        seed: The run's seed.
        log_file: Where the engine's own output goes.
        num_ranks: Ranks of the trainer; each has an engine.
        rank: Which of them the engine belongs to.
        local_rank: Which of the ranks on this machine the engine belongs to.
        num_local_ranks: Ranks on this machine.
        device_index: Which of the visible GPUs the trainer has, None on a CPU.
        loads_in_flight: Whether `load_weights` may be called while requests are in flight, which go on with the new weights.
        sleeps: Whether it will be asked to sleep, which some engines have to know at their start.
        max_restarts: Times that an engine whose processes end is started again.
    """

    model: ServedModel
    max_length: int
    seed: int
    log_file: Path
    num_ranks: int = 1
    rank: int = 0
    local_rank: int = 0
    num_local_ranks: int = 1
    device_index: int | None = None
    loads_in_flight: bool = False
    sleeps: bool = False
    max_restarts: int = 0


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
        """The optimizer step whose weights it samples from; -1 before the first `load_weights` and where it has lost them."""

    @property
    def can_sleep(self) -> bool:
        """Whether it can leave its device to the trainer. Where it cannot, `sleep` and `wake` are never called."""
        return False

    @property
    def kv_cache_bytes(self) -> int:
        """Memory that it takes for keys and values beside the trainer; 0 where it samples elsewhere."""
        return 0

    @property
    def weights_share(self) -> float:
        """Share of a copy of the model's weights that it keeps beside the trainer; 0 where it samples elsewhere."""
        return 1.0

    @abstractmethod
    def start(self, spec: EngineSpec) -> None:
        """Starts the engine, or returns at once if it runs."""

    @abstractmethod
    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Samples one completion."""

    @abstractmethod
    async def load_weights(self, path: Path, version: int) -> None:
        """Makes what `Policy.save_trained` wrote to `path` the weights of all later requests."""

    async def sleep(self) -> None:
        """Leaves the device's memory to the trainer. Until `wake` it is asked for nothing but `close`.

        Weights that are not kept are lost: `policy_version` is -1 then, and `load_weights` has to come after `wake`.

        Raises:
            EngineError: Requests are in flight, or it cannot sleep.
        """
        raise EngineError(f"{type(self).__name__} cannot sleep")

    async def wake(self) -> None:
        """Takes its memory back.

        Raises:
            EngineError: It cannot sleep.
        """
        raise EngineError(f"{type(self).__name__} cannot sleep, so there is nothing to wake")

    async def restart(self, lost: EngineLostError) -> None:
        """Starts again, with the weights that were loaded last, or returns at once if that was done since `lost` was raised.

        Raises:
            EngineError: `lost` itself, where the engine cannot or was restarted as often as it may; or the start failed.
        """
        raise lost

    @abstractmethod
    def close(self) -> None:
        """Ends the engine and everything it started, or returns at once if it does not run."""


def check_version_file(path: Path, version: int) -> None:
    """Refuses an adapter folder that was written for another version.

    Raises:
        EngineError: The folder's version file is missing or holds another version.
    """
    file = path / VERSION_FILE
    written = file.read_text() if file.exists() else "none"
    if written != str(version):
        raise EngineError(f"the adapter folder {path} holds version {written}, version {version} was asked for")


def engine_log(rank: int) -> str:
    """Name of the file that a rank's engine writes to.

    >>> engine_log(0), engine_log(3)
    ('engine.log', 'engine.rank3.log')
    """
    return f"engine.rank{rank}.log" if rank else "engine.log"
