"""The interface between a pool of servers and one server of any kind."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fuchsia_pl.engines.base import SamplingParams
from fuchsia_pl.engines.published import PublishedWeights
from fuchsia_pl.types import Completion


class ServerGoneError(Exception):
    """The server does not answer, or reports that it is broken. Another server may succeed."""


class UnknownWeightsError(Exception):
    """The server does not have the weights that a request names."""


@dataclass(frozen=True)
class HostedModel:
    """The base model of a server.

    Attributes:
        id: Name under which the server lists the model.
        root: Path or hub name from which the server loaded it.
        max_length: Longest prompt plus completion, in tokens.

    >>> HostedModel("tiny", "/models/tiny", 64).max_length
    64
    """

    id: str
    root: str
    max_length: int


class ServerClient(ABC):
    """Requests to one server. All coroutines run on one event loop and end within their bounds.

    Each of them raises `ServerGoneError` if the server does not answer or is broken, and `ConfigError` if it refuses the key.

    Attributes:
        url: Address of the server.
    """

    url: str

    @abstractmethod
    async def health(self) -> None:
        """Returns if the server and its engine run.

        Raises:
            ServerGoneError: They do not.
        """

    @abstractmethod
    async def model(self) -> HostedModel:
        """The model that the server was started with."""

    @abstractmethod
    async def load(self, weights: PublishedWeights, timeout_s: float) -> None:
        """Makes the server serve these weights under their name, or returns at once if it does already.

        Args:
            weights: Published weights.
            timeout_s: Bound in seconds.

        Raises:
            EngineError: The server runs and refuses them.
        """

    @abstractmethod
    async def forget(self, names: set[str]) -> None:
        """Frees the memory of weights that no request names any more."""

    @abstractmethod
    async def complete(
        self, weights: PublishedWeights, prompt_ids: Sequence[int], sampling: SamplingParams, timeout_s: float
    ) -> Completion:
        """Generates one completion.

        Args:
            weights: The weights to generate with.
            prompt_ids: The prompt.
            sampling: How the completion is sampled.
            timeout_s: Bound in seconds.

        Raises:
            UnknownWeightsError: The server does not have these weights.
            EngineError: The server runs and refuses the request, as every other server would; or its answer is invalid.
        """

    @abstractmethod
    async def score(self, weights: PublishedWeights, token_ids: Sequence[int], timeout_s: float) -> tuple[float, ...]:
        """Computes the logprobs of given ids; see `Engine.score`.

        Args:
            weights: The weights to compute them with.
            token_ids: One row of at least two ids.
            timeout_s: Bound in seconds.

        Raises:
            UnknownWeightsError: The server does not have these weights.
            EngineError: The server runs and refuses the request, as every other server would; or its answer is invalid.
        """

    @abstractmethod
    async def close(self) -> None:
        """Closes the connections. The server continues to run."""
