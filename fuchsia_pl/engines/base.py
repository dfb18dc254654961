"""The interface between the trainer and engines that generate completions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fuchsia_pl.types import Completion, ServedModel

VERSION_FILE = "policy_version"


class EngineError(RuntimeError):
    """The engine did not start, did not answer in time, or died. The message contains the engine's own error."""


class EngineLostError(EngineError):
    """The engine's processes have ended.

    Args:
        message: What happened.
        start_number: Number of the start that has ended. If several requests fail, only one of them restarts the engine.
    """

    def __init__(self, message: str, start_number: int) -> None:
        super().__init__(message)
        self.start_number = start_number


@dataclass(frozen=True)
class EngineSpec:
    """Settings of the run that an engine needs at its start.

    Attributes:
        model: The model that trainer and engine share.
        max_length: Longest prompt plus completion, in tokens.
        seed: The run's seed.
        log_file: File for the engine's own output.
        num_ranks: Number of ranks of the trainer. Each has its own engine.
        rank: The rank that the engine belongs to.
        local_rank: Its number among the ranks on this machine.
        num_local_ranks: Number of ranks on this machine.
        device_index: Index of the trainer's GPU among the visible ones, None on a CPU.
        loads_in_flight: Whether `load_weights` may be called while requests are in flight. They continue with the new weights.
        sleeps: Whether `sleep` will be called. Some engines need this at their start.
        max_restarts: How often an engine whose processes have ended is started again.
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
    """How one completion is sampled. All other sampling parameters have their neutral values.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        max_tokens: Upper bound of the completion's length.
        seed: Seed of this one request.
        stop: Strings after which sampling ends. Their tokens stay in the completion.
        stop_token_ids: Ids after which sampling ends: the end-of-turn tokens of the model.

    >>> SamplingParams(temperature=1.0, max_tokens=32, seed=7, stop_token_ids=(2,)).stop
    ()
    """

    temperature: float
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


class Engine(ABC):
    """Generates completions of ids, and may compute logprobs of given ids, with the weights that were loaded last.

    The constructor is called from a config and must be cheap. Nothing runs before `start` or after `close`. All coroutines may
    be awaited from any event loop, end within a bounded time, and raise `EngineError`.
    """

    @property
    @abstractmethod
    def policy_version(self) -> int:
        """The optimizer step of its weights; -1 before the first `load_weights` and after it has lost them."""

    @property
    def name(self) -> str:
        """Its name on the console."""
        return type(self).__name__

    @property
    def can_sleep(self) -> bool:
        """Whether it can free its device for the trainer. If it cannot, `sleep` and `wake` are never called."""
        return False

    @property
    def kv_cache_bytes(self) -> int:
        """Memory for its keys and values on the trainer's device; 0 if it runs elsewhere."""
        return 0

    @property
    def weights_share(self) -> float:
        """Share of a copy of the model's weights on the trainer's device; 0 if it runs elsewhere."""
        return 1.0

    @abstractmethod
    def start(self, spec: EngineSpec) -> None:
        """Starts the engine. Returns at once if it runs."""

    @abstractmethod
    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Samples one completion."""

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Computes the log-probabilities of given ids with the weights of `policy_version`, at temperature 1.

        Nothing is sampled, and no sampling setting applies. If weights are loaded meanwhile, the row is computed again.

        Args:
            token_ids: T ids of one row, prompt and completion alike; at most `EngineSpec.max_length`.

        Returns:
            T - 1 values of float32 precision. Value `t` is the logprob of `token_ids[t + 1]` after `token_ids[: t + 1]`. The
            first id follows nothing and has no value, so a row of one id has none.

        Raises:
            EngineError: The engine cannot score, the row is too long, or the engine failed.
        """
        raise EngineError(f"{type(self).__name__} cannot compute logprobs of given ids")

    @abstractmethod
    async def load_weights(self, path: Path, version: int) -> None:
        """Uses the weights that `Policy.save_trained` wrote to `path` for all later requests."""

    async def sleep(self) -> None:
        """Frees the device's memory for the trainer. Until `wake` only `close` may be called.

        An engine that does not keep its weights sets `policy_version` to -1 and requires `load_weights` after `wake`.

        Raises:
            EngineError: Requests are in flight, or it cannot sleep.
        """
        raise EngineError(f"{type(self).__name__} cannot sleep")

    async def wake(self) -> None:
        """Allocates its memory again.

        Raises:
            EngineError: It cannot sleep.
        """
        raise EngineError(f"{type(self).__name__} cannot sleep, so there is nothing to wake")

    async def restart(self, lost: EngineLostError) -> None:
        """Starts again with the weights that were loaded last. Returns at once if this was done since `lost` was raised.

        Raises:
            EngineError: `lost` itself if the engine cannot restart or has used all its restarts; or the start failed.
        """
        raise lost

    @abstractmethod
    def close(self) -> None:
        """Ends the engine and all processes it started. Returns at once if it does not run."""


def check_version_file(path: Path, version: int) -> None:
    """Checks that a folder of weights was written for a version.

    Raises:
        EngineError: The folder's version file is missing or holds another version.
    """
    file = path / VERSION_FILE
    written = file.read_text() if file.exists() else "none"
    if written != str(version):
        raise EngineError(f"the folder {path} contains version {written}, and version {version} is required")


def engine_log(rank: int) -> str:
    """Name of the log file of a rank's engine.

    >>> engine_log(0), engine_log(3)
    ('engine.log', 'engine.rank3.log')
    """
    return f"engine.rank{rank}.log" if rank else "engine.log"
