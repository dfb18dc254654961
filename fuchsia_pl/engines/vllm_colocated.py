"""vLLM in this process: its `AsyncLLM` on an event loop in a thread of its own."""

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from fuchsia_pl.engines.base import Engine, EngineError, EngineSpec, SamplingParams, check_version_file
from fuchsia_pl.engines.merge import adapter_rank, is_adapter
from fuchsia_pl.engines.output import output_to, tail
from fuchsia_pl.engines.vllm_convert import to_completion, to_vllm
from fuchsia_pl.types import Completion, ConfigError

SyncMode = Literal["auto", "lora", "merge"]
T = TypeVar("T")

# The ranks for which vLLM has buffers; others are rounded up (vllm.config.lora.MaxLoRARanks).
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ADAPTER_ID = 1
CLOSE_TIMEOUT_S = 60.0
# A burst of requests is complete once none came for this long. It is not waited for longer than the second number, and
# neither are vLLM's answers to pause and resume: those of an engine that died never come, and a request then says so.
SETTLE_S = 0.02
MAX_SETTLE_S = 2.0

logger = logging.getLogger(__name__)
WORKER_EXTENSION = "fuchsia_pl.engines.vllm_worker.WorkerExtension"


class VLLMColocatedEngine(Engine):
    """vLLM beside the trainer. Untested on a GPU.

    Args:
        sync_mode: How trained weights reach vLLM. "lora": it serves the adapter, reloaded in place. "merge": its worker
            rebuilds W + scale B A from the pristine weights; served LoRA costs most of the speed on a CPU. "auto": merge on
            a CPU or without LoRA, lora on a GPU.
        kv_cache_gb: Memory for keys and values, in GiB.
        max_num_seqs: Requests that are decoded at the same time.
        enforce_eager: Skip compilation: starts faster, samples slower.
        max_lora_rank: Largest adapter rank in mode "lora"; None takes the policy's.
        start_timeout_s: Bound of the start, download of nothing included.
        request_timeout_s: Bound of each request and of each load of an adapter.

    Raises:
        ConfigError: A bound or a size is not above 0.
    """

    def __init__(
        self,
        sync_mode: SyncMode = "auto",
        kv_cache_gb: float = 4.0,
        max_num_seqs: int = 64,
        enforce_eager: bool = False,
        max_lora_rank: int | None = None,
        start_timeout_s: float = 600.0,
        request_timeout_s: float = 600.0,
    ) -> None:
        sizes = {
            "kv_cache_gb": kv_cache_gb,
            "max_num_seqs": max_num_seqs,
            "start_timeout_s": start_timeout_s,
            "request_timeout_s": request_timeout_s,
        }
        for name, value in sizes.items():
            if value <= 0:
                raise ConfigError(f"data.engine.init_args.{name} must be above 0, got {value}")
        self.sync_mode = sync_mode
        self.kv_cache_gb = kv_cache_gb
        self.max_num_seqs = max_num_seqs
        self.enforce_eager = enforce_eager
        self.max_lora_rank = max_lora_rank
        self.start_timeout_s = start_timeout_s
        self.request_timeout_s = request_timeout_s
        self._version = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._spec: EngineSpec | None = None
        self._llm: Any = None
        self._lora_request: Any = None
        self._request_ids = itertools.count()
        self._num_in_flight = 0
        self._pause: asyncio.Future[None] | None = None
        self._resume: asyncio.Task[None] | None = None

    @property
    def policy_version(self) -> int:
        """The optimizer step whose weights it samples from; -1 before the first `load_adapter`."""
        return self._version

    @property
    def serves_lora(self) -> bool:
        """Whether vLLM itself applies the adapter, in place of merged weights."""
        assert self._spec is not None, "start comes first"
        if self.sync_mode == "auto":
            return self._spec.model.lora_rank > 0 and torch.cuda.is_available()
        return self.sync_mode == "lora"

    def start(self, spec: EngineSpec) -> None:
        """Starts vLLM and waits until it answers.

        Raises:
            EngineError: It failed or took longer than `start_timeout_s`.
            ConfigError: Mode "lora" without an adapter, or with one of a higher rank than `max_lora_rank`.
        """
        if self._llm is not None:
            return
        self._spec = spec
        if self.serves_lora and spec.model.lora_rank == 0:
            raise ConfigError(
                'data.engine.init_args.sync_mode is "lora", but model.policy.lora.enabled is false: use "auto"'
            )
        if self.serves_lora and self.max_lora_rank is not None and self.max_lora_rank < spec.model.lora_rank:
            raise ConfigError(
                f"data.engine.init_args.max_lora_rank={self.max_lora_rank} is below model.policy.lora.r={spec.model.lora_rank}: "
                "leave it out"
            )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        with output_to(spec.log_file):
            future = asyncio.run_coroutine_threadsafe(self._start(spec), self._loop)
            try:
                self._llm = future.result(self.start_timeout_s)
                _log_to(spec.log_file)
            except TimeoutError:
                raise EngineError(self._words(f"vLLM did not start within {self.start_timeout_s:g} s")) from None
            except Exception as error:  # whatever vLLM raises at its start is passed on with the end of its log
                raise EngineError(self._words(f"vLLM did not start ({type(error).__name__}: {error})")) from error
            finally:
                if self._llm is None:
                    # A start cannot be interrupted; an engine that comes up too late is shut down as it arrives.
                    future.add_done_callback(_shut_down_late)
                    self._stop_loop(CLOSE_TIMEOUT_S if future.done() else 0.0)

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Samples one completion; see `Engine.generate`."""
        return await self._call(self._generate(list(prompt_ids), sampling), "a completion")

    async def load_adapter(self, path: Path, version: int) -> None:
        """Serves what was trained; see `Engine.load_adapter`."""
        await self._call(self._load(path, version), "the load of an adapter")

    def close(self) -> None:
        """Ends vLLM's processes and the thread."""
        if self._loop is None:
            return
        try:
            if self._llm is not None:
                asyncio.run_coroutine_threadsafe(_shutdown(self._llm), self._loop).result(CLOSE_TIMEOUT_S)
        except Exception:  # closing must not hide what ended the run
            logger.exception("vLLM did not shut down in order")
        finally:
            self._stop_loop(CLOSE_TIMEOUT_S)
        # AsyncLLM is part of reference cycles, and its finaliser fails once the interpreter is being taken down.
        gc.collect()

    async def _call(self, coroutine: Coroutine[Any, Any, T], what: str) -> T:
        if self._llm is None or self._loop is None:
            coroutine.close()
            raise EngineError(f"{what} was asked of an engine that does not run: call start first")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.request_timeout_s)
        except TimeoutError:
            raise EngineError(self._words(f"{what} took longer than {self.request_timeout_s:g} s")) from None
        except EngineError:
            raise
        except Exception as error:  # vLLM's errors have many types; each ends the run with the end of its log
            raise EngineError(self._words(f"vLLM failed at {what} ({type(error).__name__}: {error})")) from error

    async def _start(self, spec: EngineSpec) -> Any:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # where it is set, kv_cache_gb would do nothing
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        rank = max(self.max_lora_rank or spec.model.lora_rank, 1)
        args = AsyncEngineArgs(
            model=spec.model.folder,
            dtype=spec.model.dtype,
            max_model_len=spec.max_length,
            max_num_seqs=self.max_num_seqs,
            # A seeded request kills the CPU worker when its prefill is chunked, so every prompt must fit into one batch.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(spec.max_length, 2048),
            enable_prefix_caching=True,
            kv_cache_memory_bytes=int(self.kv_cache_gb * 2**30),
            enforce_eager=self.enforce_eager,
            enable_lora=self.serves_lora,
            max_loras=1,
            max_lora_rank=min((r for r in VLLM_LORA_RANKS if r >= rank), default=rank),
            worker_extension_cls=WORKER_EXTENSION,
            # Nothing of the model's own generation config, and logprobs at the temperature that was sampled with.
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            seed=spec.seed,
            disable_log_stats=True,
        )
        # In no local variable: a library imported above keeps this frame alive, and with it what it names.
        return AsyncLLM.from_engine_args(args)

    async def _generate(self, prompt_ids: list[int], sampling: SamplingParams) -> Completion:
        from vllm import TokensPrompt

        params = to_vllm(sampling)
        version, request_id = self._version, str(next(self._request_ids))
        if self._num_in_flight == 0:
            self._pause = asyncio.ensure_future(self._hold())
            self._resume = asyncio.ensure_future(self._resume_when_settled(self._pause))
            self._resume.add_done_callback(lambda task: task.cancelled() or task.exception())  # the requests say it
        self._num_in_flight += 1
        try:
            assert self._pause is not None
            await asyncio.shield(self._pause)
            stream = self._llm.generate(
                TokensPrompt(prompt_token_ids=prompt_ids), params, request_id, lora_request=self._lora_request
            )
            async for output in stream:
                final = output.outputs[0]
        finally:
            self._num_in_flight -= 1
        return to_completion(final, version)

    async def _hold(self) -> None:
        """Lets vLLM schedule the requests of a burst together.

        The rounding of a row depends on the rows beside it. Were the first request scheduled while the others arrive, the
        batches, and with them the last bits of the logprobs, would depend on the moment.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._llm.pause_generation(mode="keep", clear_cache=False), MAX_SETTLE_S)

    async def _resume_when_settled(self, pause: "asyncio.Future[None]") -> None:
        await asyncio.shield(pause)
        for _ in range(round(MAX_SETTLE_S / SETTLE_S)):
            num_in_flight = self._num_in_flight
            await asyncio.sleep(SETTLE_S)
            if self._num_in_flight == num_in_flight:
                break
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._llm.resume_generation(), MAX_SETTLE_S)

    async def _load(self, path: Path, version: int) -> None:
        assert self._spec is not None
        check_version_file(path, version)
        if self._num_in_flight:
            raise EngineError(f"{self._num_in_flight} requests are in flight: weights change only between requests")
        if self.serves_lora:
            await self._serve_adapter(path)
        else:
            await self._llm.collective_rpc("load_trained_weights", args=(self._spec.model.folder, str(path)))
        # Cached keys and values are those of the old weights.
        if not await self._llm.reset_prefix_cache():
            raise EngineError(
                "vLLM did not reset its prefix cache: it would go on with the old weights' keys and values"
            )
        self._version = version

    async def _serve_adapter(self, path: Path) -> None:
        from vllm.lora.request import LoRARequest

        assert self._spec is not None
        if not is_adapter(path):
            raise EngineError(f'{path} is no adapter, and sync_mode is "lora": use "merge" for whole weights')
        rank, allowed = adapter_rank(path), self.max_lora_rank or self._spec.model.lora_rank
        if rank > allowed:
            raise EngineError(
                f"the adapter has r={rank}, and the engine was started for r up to {allowed}: "
                f"set data.engine.init_args.max_lora_rank to {rank} or leave it out"
            )
        request = LoRARequest("policy", ADAPTER_ID, str(path), load_inplace=True)
        if not await self._llm.add_lora(request):
            raise EngineError(self._words(f"vLLM did not load the adapter in {path}"))
        # Requests name the loaded adapter and must not load it once more.
        self._lora_request = LoRARequest("policy", ADAPTER_ID, str(path))

    def _stop_loop(self, wait_s: float) -> None:
        assert self._loop is not None
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(wait_s)
        if not self._thread.is_alive():
            self._loop.close()
        self._llm, self._loop, self._lora_request, self._version = None, None, None, -1
        self._pause, self._resume, self._num_in_flight = None, None, 0

    def _words(self, what: str) -> str:
        assert self._spec is not None
        return f"{what}. The end of {self._spec.log_file}:\n{tail(self._spec.log_file)}"


def _shut_down_late(future: "Future[Any]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().shutdown()


async def _shutdown(llm: Any) -> None:
    llm.shutdown()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)


def _log_to(file: Path) -> None:
    """Points vLLM's logger in this process at the file its worker writes to."""
    logging.getLogger("vllm").handlers = [logging.FileHandler(file)]
