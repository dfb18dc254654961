"""vLLM in servers of its own, on this machine or others: `fuchsia serve` there, this engine here."""

import asyncio
import logging
import os
import resource
from collections.abc import Coroutine, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from fuchsia_pl.engines.base import Engine, EngineError, EngineSpec, SamplingParams
from fuchsia_pl.engines.published import PublishedWeights, named, publish, remove_published
from fuchsia_pl.engines.vllm_arguments import NUM_SERVED_ADAPTERS
from fuchsia_pl.engines.vllm_convert import from_response, to_request
from fuchsia_pl.engines.vllm_guard import API_KEY_VARIABLE
from fuchsia_pl.engines.vllm_http import VLLMClient
from fuchsia_pl.engines.vllm_pool import ServerPool
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

    Each request goes to the server with the fewest of ours in flight. A server that goes away is dropped, its requests run
    on another, and it is taken back when it is well, with the newest weights. A request asks for its weights by a name made of
    version and content, so no server can answer with others; an adapter's name is part of the keys of vLLM's prefix cache too.
    Where all weights are trained, they go from GPU to GPU through vLLM's weight transfer, which is untested.

    Args:
        urls: Where the servers are, as http://host:port.
        api_key: The servers' key; None takes the environment variable VLLM_API_KEY. What stands here is saved with the
            run's config.
        adapter_folder: Where weights are put: adapters are loaded from there, so the trainer and every server see it under the
            same path. None takes `adapters` in the run folder, which serves where all run on one machine or the run folder is
            on a shared file system. The newest two lie there (one where all weights are trained); after a run of one rank, none.
        timeout_s: Bound of the wait for the first server, of each request to a server and of each load of weights there.
        recovery_timeout_s: How long to wait for a server to come back when none is left.

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
        self._published: list[PublishedWeights] = []  # what lies in the adapter folder, the newest last

    @property
    def policy_version(self) -> int:
        """The optimizer step whose weights it samples from; -1 before the first `load_weights`."""
        return -1 if self._serving is None else self._serving.version

    @property
    def weights_share(self) -> float:
        """The servers have the weights, on devices of their own."""
        return 0.0

    def start(self, spec: EngineSpec) -> None:
        """Waits until a server answers, and checks that it serves what is trained.

        Raises:
            EngineError: None answered within `timeout_s`.
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
        self._spec = spec
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

    async def load_weights(self, path: Path, version: int) -> None:
        """Gives what was trained to every server; see `Engine.load_weights`."""
        await self._call(self._load(path, version), "the load of weights")

    def close(self) -> None:
        """Closes the connections. The servers run on, without this run's adapters (all weights stay)."""
        if self._thread is None:
            return
        try:
            if self._pool is not None:
                self._thread.run(self._end(self._pool), CLOSE_TIMEOUT_S)
        except Exception:  # closing must not hide what ended the run
            logger.exception("the connections to vLLM's servers were not closed in order")
        finally:
            self._stop()

    async def _call(self, coroutine: Coroutine[Any, Any, T], what: str) -> T:
        if self._pool is None or self._thread is None:
            coroutine.close()
            raise EngineError(f"{what} was asked of an engine that does not run: call start first")
        bound_s = 2 * self.timeout_s + self.recovery_timeout_s
        try:
            return await self._thread.call(coroutine, bound_s)
        except TimeoutError:
            raise EngineError(
                self._pool.words(f"{what} took longer than {bound_s:g} s, with all its attempts")
            ) from None

    async def _start(self, spec: EngineSpec) -> ServerPool:
        def check(url: str, card: dict[str, Any]) -> None:
            check_served(url, card, spec)

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
        except BaseException:  # whatever ends the start, also a cancelled one, leaves no watcher behind
            await pool.close()
            raise
        return pool

    async def _generate(self, prompt_ids: list[int], sampling: SamplingParams) -> Completion:
        assert self._pool is not None
        weights = self._serving  # of this moment: newer ones may come while the request runs
        if weights is None:
            raise EngineError("a completion was asked for before the first weights were loaded")
        answer = await self._pool.complete(weights, to_request(weights.name, prompt_ids, sampling))
        return from_response(answer, weights.name, weights.version)

    async def _load(self, path: Path, version: int) -> None:
        assert self._spec is not None
        assert self._pool is not None
        root = Path(self.adapter_folder) if self.adapter_folder else self._spec.log_file.parent / ADAPTER_FOLDER
        # All weights go from the first rank's GPU to the servers; the others only have to know their name.
        publishes = self._spec.model.lora_rank > 0 or self._spec.rank == 0
        weights = await asyncio.to_thread(publish if publishes else named, path, version, root)
        self._published = [*(known for known in self._published if known != weights), weights]
        num_kept = NUM_SERVED_ADAPTERS if self._spec.model.lora_rank else 1
        retired = self._published[:-num_kept]
        self._pool.retired |= {known.name for known in retired}
        await self._pool.load(weights)
        self._serving = weights
        for known in retired:
            await asyncio.to_thread(remove_published, known)
        self._published = self._published[-num_kept:]

    async def _end(self, pool: ServerPool) -> None:
        assert self._spec is not None
        try:
            # Other ranks may still sample from what this one loaded: their weights have the same names.
            if self._spec.num_ranks == 1:
                pool.retired |= {known.name for known in self._published}
                await pool.forget_retired()
                for known in self._published:
                    await asyncio.to_thread(remove_published, known)
        finally:
            await pool.close()
            await cancel_others(CLOSE_TIMEOUT_S)

    def _stop(self) -> None:
        assert self._thread is not None
        self._thread.stop(CLOSE_TIMEOUT_S)
        self._thread, self._pool, self._serving, self._published = None, None, None, []


def allow_many_connections() -> None:
    """Raises this process's limit of open files: each rollout in flight has a connection of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = NUM_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, NUM_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_served(url: str, card: dict[str, Any], spec: EngineSpec) -> None:
    """Refuses a server that cannot serve the run.

    Args:
        url: Of the server, for the message.
        card: What it says of its base model.
        spec: What the run needs.

    Raises:
        ConfigError: It has another model, or one with too short a length.
    """
    length = card.get("max_model_len") or 0
    if length < spec.max_length:
        raise ConfigError(
            f"the vLLM server {url} was started for {length} tokens, and data.sampling.max_length is {spec.max_length}: start it "
            "with `fuchsia serve` and the configs of this run"
        )
    if not _names(spec.model) & {_last(str(card.get("root"))), _last(str(card.get("id")))}:
        raise ConfigError(
            f"the vLLM server {url} serves {card.get('root')}, and model.policy.name is {spec.model.name}: start it with "
            "`fuchsia serve` and the configs of this run"
        )


def _names(model: ServedModel) -> set[str]:
    """The last parts of what a server may call the model: its path may differ from machine to machine."""
    return {_last(model.folder), _last(model.name)}


def _last(path: str) -> str:
    return PurePosixPath(path).name


def _base_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"data.engine.init_args.urls must be like http://host:8000, got {url!r}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
