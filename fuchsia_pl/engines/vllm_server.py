"""vLLM in separate servers, on this machine or others: `fuchsia serve` starts one, and this engine sends requests to them."""

import asyncio
import logging
import os
import resource
from collections.abc import Coroutine, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from fuchsia_pl.engines.base import Engine, EngineError, EngineSpec, SamplingParams
from fuchsia_pl.engines.pool import ServerPool
from fuchsia_pl.engines.published import PublishedWeights, Publisher
from fuchsia_pl.engines.server_client import HostedModel
from fuchsia_pl.engines.vllm_arguments import NUM_SERVED_ADAPTERS
from fuchsia_pl.engines.vllm_guard import API_KEY_VARIABLE
from fuchsia_pl.engines.vllm_http import VLLMClient
from fuchsia_pl.engines.vllm_transfer import WeightSender, WeightTransferClient
from fuchsia_pl.loop import LoopThread, cancel_others
from fuchsia_pl.types import Completion, ConfigError, ServedModel

ADAPTER_FOLDER = "adapters"
CLOSE_TIMEOUT_S = 30.0
NUM_OPEN_FILES = 65536

T = TypeVar("T")
logger = logging.getLogger(__name__)


class VLLMServerEngine(Engine):
    """Stock vLLM servers, started by `fuchsia serve` with the configs of the run.

    Each request goes to the server with the fewest of our requests in flight. A server that fails is dropped, its requests run
    on another one, and it is readmitted with the newest weights once it is healthy. A request names its weights by version and
    content, so no server can answer with others; the name of an adapter is also part of the keys of vLLM's prefix cache.
    If all weights are trained, they go from GPU to GPU through vLLM's weight transfer, which is untested.

    Args:
        urls: Addresses of the servers, as http://host:port.
        api_key: Key of the servers; None takes the environment variable VLLM_API_KEY. A key given here is saved with the run's
            config.
        adapter_folder: Folder for the weights. Servers load adapters from it, so the trainer and every server must see it under
            the same path. None takes `adapters` in the run folder, which works if all run on one machine or the run folder is
            on a shared file system. It holds the newest two (one if all weights are trained); after a run of one rank, none.
        timeout_s: Bound of the wait for the first server, of each request to a server and of each load of weights there.
        recovery_timeout_s: How long to wait for a server when none is left.

    Raises:
        ConfigError: No or bad urls, or a bound that is not above 0.
    """

    def __init__(
        self,
        urls: list[str],
        api_key: str | None = None,
        adapter_folder: str | None = None,
        timeout_s: float = 600.0,
        recovery_timeout_s: float = 120.0,
    ) -> None:
        for name, value in {"timeout_s": timeout_s, "recovery_timeout_s": recovery_timeout_s}.items():
            if value <= 0:
                raise ConfigError(f"data.engine.init_args.{name} must be above 0, got {value}")
        self.urls = [_base_url(url) for url in urls]
        if not urls or len(set(self.urls)) < len(urls):
            raise ConfigError(f"data.engine.init_args.urls must name one or more different servers, got {urls}")
        self.api_key = api_key
        self.adapter_folder = adapter_folder
        self.timeout_s = timeout_s
        self.recovery_timeout_s = recovery_timeout_s
        self._spec: EngineSpec | None = None
        self._thread: LoopThread | None = None
        self._pool: ServerPool | None = None
        self._serving: PublishedWeights | None = None
        self._publisher: Publisher | None = None

    @property
    def policy_version(self) -> int:
        """The optimizer step of its weights; -1 before the first `load_weights`."""
        return -1 if self._serving is None else self._serving.version

    @property
    def weights_share(self) -> float:
        """None: the servers keep the weights on other devices."""
        return 0.0

    def start(self, spec: EngineSpec) -> None:
        """Waits until a server answers, and checks that it serves the trained model.

        Raises:
            EngineError: No server answered within `timeout_s`.
            ConfigError: A server has another model, shorter completions or another key; or all weights are trained on a CPU.
        """
        if self._pool is not None:
            return
        if spec.model.lora_rank == 0 and spec.device_index is None:
            raise ConfigError(
                "model.policy.lora.enabled is false and the trainer is on a CPU: whole weights reach vLLM's servers through "
                "vLLM's weight transfer, which goes from GPU to GPU. Train an adapter, or use VLLMColocatedEngine"
            )
        if spec.loads_in_flight:
            raise ConfigError(
                'data.sampling.in_flight is "continue", and a request to a server ends with the weights it began with: use '
                '"finish", or VLLMColocatedEngine'
            )
        # All weights go from the first rank's GPU to the servers. The other ranks only compute their name.
        copies, num_kept = (
            spec.model.lora_rank > 0 or spec.rank == 0,
            NUM_SERVED_ADAPTERS if spec.model.lora_rank else 1,
        )
        root = Path(self.adapter_folder) if self.adapter_folder else spec.log_file.parent / ADAPTER_FOLDER
        self._spec, self._publisher = spec, Publisher(root, num_kept, copies)
        allow_many_connections()
        self._thread = LoopThread("vllm-servers")
        try:
            self._pool = self._thread.run(self._start(spec), self.timeout_s + CLOSE_TIMEOUT_S)
        finally:
            if self._pool is None:
                self._stop()

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Samples one completion; see `Engine.generate`."""
        return await self._call(self._generate(list(prompt_ids), sampling), "a completion")

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Computes the logprobs of given ids; see `Engine.score`."""
        return await self._call(self._score(list(token_ids)), "the logprobs of a row")

    async def load_weights(self, path: Path, version: int) -> None:
        """Makes every server serve the trained weights; see `Engine.load_weights`."""
        await self._call(self._load(path, version), "the load of weights")

    def close(self) -> None:
        """Closes the connections. The servers continue to run, without this run's adapters (whole weights stay)."""
        if self._thread is None:
            return
        try:
            if self._pool is not None:
                self._thread.run(self._end(self._pool), CLOSE_TIMEOUT_S)
        except Exception:  # closing must not hide what ended the run
            logger.exception("the connections to vLLM's servers were not closed cleanly")
        finally:
            self._stop()

    async def _call(self, coroutine: Coroutine[Any, Any, T], what: str) -> T:
        if self._pool is None or self._thread is None:
            coroutine.close()
            raise EngineError(f"{what} was requested from an engine that does not run: call start first")
        bound_s = 2 * self.timeout_s + self.recovery_timeout_s
        try:
            return await self._thread.call(coroutine, bound_s)
        except TimeoutError:
            raise EngineError(
                self._pool.report(f"{what} took longer than {bound_s:g} s, with all its attempts")
            ) from None

    async def _start(self, spec: EngineSpec) -> ServerPool:
        def check(url: str, model: HostedModel) -> None:
            check_served(url, model, spec)

        key = self.api_key or os.environ.get(API_KEY_VARIABLE) or None
        clients: list[VLLMClient]
        if spec.model.lora_rank:
            clients = [VLLMClient(url, key) for url in self.urls]
        else:
            sender = WeightSender(spec.device_index or 0, key) if spec.rank == 0 else None
            clients = [WeightTransferClient(url, key, sender) for url in self.urls]
        pool = ServerPool(clients, check, self.timeout_s, self.recovery_timeout_s)
        try:
            await pool.start()
        except BaseException:  # also a cancelled start must leave no watcher behind
            await pool.close()
            raise
        return pool

    async def _generate(self, prompt_ids: list[int], sampling: SamplingParams) -> Completion:
        assert self._pool is not None
        return await self._pool.complete(self._current(), prompt_ids, sampling)

    async def _score(self, token_ids: list[int]) -> tuple[float, ...]:
        assert self._pool is not None
        weights = self._current()
        if len(token_ids) < 2:
            return ()
        logprobs = await self._pool.score(weights, token_ids)
        # Newer weights may have been loaded meanwhile.
        return logprobs if weights == self._current() else await self._score(token_ids)

    def _current(self) -> PublishedWeights:
        """The weights of new requests. A request keeps its weights while newer ones are loaded."""
        if self._serving is None:
            raise EngineError("a request was made before the first weights were loaded")
        return self._serving

    async def _load(self, path: Path, version: int) -> None:
        assert self._publisher is not None
        assert self._pool is not None
        weights = await asyncio.to_thread(self._publisher.publish, path, version)
        self._pool.retire(self._publisher.outdated_names)
        await self._pool.load(weights)
        self._serving = weights
        await asyncio.to_thread(self._publisher.remove_outdated)

    async def _end(self, pool: ServerPool) -> None:
        assert self._spec is not None
        assert self._publisher is not None
        try:
            # Other ranks may still use the weights of this one: theirs have the same names.
            if self._spec.num_ranks == 1:
                pool.retire(self._publisher.names)
                await pool.forget_retired()
                await asyncio.to_thread(self._publisher.remove_all)
        finally:
            await pool.close()
            await cancel_others(CLOSE_TIMEOUT_S)

    def _stop(self) -> None:
        assert self._thread is not None
        self._thread.stop(CLOSE_TIMEOUT_S)
        self._thread, self._pool, self._serving, self._publisher = None, None, None, None


def allow_many_connections() -> None:
    """Raises this process's limit of open files, since each rollout in flight has its own connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = NUM_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, NUM_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_served(url: str, model: HostedModel, spec: EngineSpec) -> None:
    """Refuses a server that cannot serve the run.

    Args:
        url: Address of the server, for the message.
        model: The base model of the server.
        spec: The run's requirements.

    Raises:
        ConfigError: The server has another model, or a shorter maximum length.
    """
    if model.max_length < spec.max_length:
        raise ConfigError(
            f"the vLLM server {url} was started for {model.max_length} tokens, and data.sampling.max_length is "
            f"{spec.max_length}: start it with `fuchsia serve` and the configs of this run"
        )
    if not _names(spec.model) & {_last(model.root), _last(model.id)}:
        raise ConfigError(
            f"the vLLM server {url} serves {model.root}, and model.policy.name is {spec.model.name}: start it with "
            "`fuchsia serve` and the configs of this run"
        )


def _names(model: ServedModel) -> set[str]:
    """The last parts of the names that a server may use for the model: its path may differ between machines."""
    return {_last(model.folder), _last(model.name)}


def _last(path: str) -> str:
    return PurePosixPath(path).name


def _base_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"data.engine.init_args.urls must be like http://host:8000, got {url!r}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
