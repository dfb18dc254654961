"""vLLM in this process: its `AsyncLLM` on an event loop in a thread of its own."""

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from fuchsia_pl import orphans
from fuchsia_pl.engines.base import Engine, EngineError, EngineLostError, EngineSpec, SamplingParams, check_version_file
from fuchsia_pl.engines.merge import adapter_rank, is_adapter
from fuchsia_pl.engines.output import output_to, tail
from fuchsia_pl.engines.restarts import NO_START, Restarts
from fuchsia_pl.engines.vllm_arguments import (
    OVERRIDING_VARIABLE,
    VLLM_ENVIRONMENT,
    Quantization,
    VLLMSettings,
    changed_environment,
    check_mode,
    vllm_arguments,
    worker_environment,
)
from fuchsia_pl.engines.vllm_convert import to_completion, to_vllm
from fuchsia_pl.engines.vllm_processes import (
    MAX_SETTLE_S,
    end_engine_processes,
    has_ended,
    hold,
    log_to,
    shut_down,
    shut_down_late,
    socket_environment,
    while_alive,
)
from fuchsia_pl.loop import LoopThread, run_blocking
from fuchsia_pl.scratch import record_segments, scratch_folder
from fuchsia_pl.types import Completion, ConfigError

SyncMode = Literal["auto", "lora", "merge"]
T = TypeVar("T")

ADAPTER_ID = 1
CLOSE_TIMEOUT_S = 60.0
# A burst of requests is complete once none came for this long. It is not waited for longer than the second number, and
# neither are vLLM's answers to pause and resume: those of an engine that died never come, and a request then says so.
SETTLE_S = 0.02

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
        quantization: "int8" (weights) or "fp8" (weights and activations), made of the checkpoint's weights while they load.
            What is sampled then differs a little from what is trained, which the sampler's correction is for. Untested on a GPU.
        tensor_parallel_size: Devices that share a copy of the weights. Above 1 only where the trainer has one rank.
        timeout_s: Bound of the start (download of nothing included), of each request and of each load of an adapter.

    Raises:
        ConfigError: A bound or a size is not above 0.
    """

    def __init__(
        self,
        sync_mode: SyncMode = "auto",
        kv_cache_gb: float = 4.0,
        max_num_seqs: int = 64,
        enforce_eager: bool = False,
        quantization: Quantization | None = None,
        tensor_parallel_size: int = 1,
        timeout_s: float = 600.0,
    ) -> None:
        if timeout_s <= 0:
            raise ConfigError(f"data.engine.init_args.timeout_s must be above 0, got {timeout_s}")
        self.settings = VLLMSettings(kv_cache_gb, max_num_seqs, enforce_eager, quantization, tensor_parallel_size)
        self.sync_mode = sync_mode
        self.timeout_s = timeout_s
        self._version = -1
        self._thread: LoopThread | None = None
        self._spec: EngineSpec | None = None
        self._llm: Any = None
        self._lora_request: Any = None
        self._request_ids = itertools.count()
        self._in_flight: set[str] = set()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._loading = asyncio.Lock()
        self._pause: asyncio.Future[None] | None = None
        self._resume: asyncio.Task[None] | None = None
        self._is_asleep = False
        self._restarts = Restarts(self._launch, self._load_again, self._end, end_engine_processes)

    @property
    def policy_version(self) -> int:
        """The optimizer step whose weights it samples from; see `Engine.policy_version`."""
        return self._version

    @property
    def can_sleep(self) -> bool:
        """Always; on a CPU vLLM goes through the motions and keeps its memory."""
        return True

    @property
    def kv_cache_bytes(self) -> int:
        """Memory for keys and values."""
        return int(self.settings.kv_cache_gb * 2**30)

    @property
    def weights_share(self) -> float:
        """What one device holds of the weights; on a CPU all parts are in one memory."""
        return 1 / self.settings.tensor_parallel_size if torch.cuda.is_available() else 1.0

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
            EngineError: It failed or took longer than `timeout_s`.
            ConfigError: Mode "lora" without an adapter, quantized weights where they cannot work, or several ranks that would
                each need several devices.
        """
        if self._llm is not None:
            return
        self._restarts.start(spec)

    def _launch(self, spec: EngineSpec) -> None:
        self._spec = spec
        arguments = vllm_arguments(self.settings, spec.model, spec.max_length, spec.seed)
        check_mode(self.settings, self.sync_mode, self.serves_lora, spec)
        orphans.watch()
        self._scratch = scratch_folder("vllm")
        self._thread = LoopThread("vllm")
        spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        with output_to(spec.log_file):
            future = self._thread.submit(self._start(arguments))
            try:
                llm = future.result(self.timeout_s)
                if not torch.cuda.is_available():
                    self._thread.run(llm.collective_rpc("give_way"), self.timeout_s)
                self._thread.run(llm.update_weight_version(str(self._version)), self.timeout_s)
                log_to(spec.log_file)
                record_segments(Path(self._scratch.name), orphans.descendants(os.getpid()))
                self._llm = llm
            except TimeoutError:
                raise EngineError(self._words(f"vLLM did not start within {self.timeout_s:g} s")) from None
            except Exception as error:  # whatever vLLM raises at its start is passed on with the end of its log
                raise EngineError(self._words(f"vLLM did not start ({type(error).__name__}: {error})")) from error
            finally:
                if self._llm is None:
                    # A start cannot be interrupted, but for what it waits for: vLLM's processes, which note a SIGTERM that
                    # comes before they are ready and wait on, and for which this one would wait at its end. An engine that
                    # comes up nevertheless is shut down as it arrives.
                    future.add_done_callback(shut_down_late)
                    end_engine_processes()
                    self._stop_loop(CLOSE_TIMEOUT_S if future.done() else 0.0)

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Samples one completion; see `Engine.generate`."""
        return await self._call(self._generate(list(prompt_ids), sampling), "a completion")

    async def load_weights(self, path: Path, version: int) -> None:
        """Serves what was trained; see `Engine.load_weights`."""
        await self._surviving(partial(self._load, path, version), "the load of an adapter")
        self._restarts.loaded(path, version)

    async def sleep(self) -> None:
        """Leaves the device to the trainer; see `Engine.sleep`. Merged weights are not kept, since a load rebuilds them."""
        await self._surviving(self._sleep, "the order to sleep")

    async def wake(self) -> None:
        """Takes the device back; see `Engine.wake`."""
        await self._surviving(self._wake, "the order to wake")

    async def restart(self, lost: EngineLostError) -> None:
        """Starts vLLM again; see `Engine.restart`."""
        await asyncio.to_thread(self._restarts.restart, lost)

    def _load_again(self, path: Path, version: int) -> None:
        assert self._llm is not None
        load = while_alive(self._llm, partial(self._load, path, version))
        run_blocking(self._order(load, "the load of the kept weights"))

    def close(self) -> None:
        """Ends vLLM's processes and the thread."""
        self._restarts.close()

    def _end(self) -> None:
        if self._thread is None:
            return
        try:
            if self._llm is not None:
                self._thread.run(shut_down(self._llm, CLOSE_TIMEOUT_S), CLOSE_TIMEOUT_S)
        except Exception:  # closing must not hide what ended the run
            logger.exception("vLLM did not shut down in order")
        finally:
            self._stop_loop(CLOSE_TIMEOUT_S)
        # AsyncLLM is part of reference cycles, and its finaliser fails once the interpreter is being taken down.
        gc.collect()

    async def _surviving(self, order: Callable[[], Coroutine[Any, Any, None]], what: str) -> None:
        while True:
            try:
                return await self._call(while_alive(self._llm, order), what)
            except EngineLostError as lost:
                await self.restart(lost)

    async def _call(self, coroutine: Coroutine[Any, Any, T], what: str) -> T:
        if self._restarts.is_busy:
            coroutine.close()
            raise EngineLostError(f"{what} was asked for while the engine starts again", NO_START)
        return await self._order(coroutine, what)

    async def _order(self, coroutine: Coroutine[Any, Any, T], what: str) -> T:
        if self._llm is None or self._thread is None:
            coroutine.close()
            raise EngineError(f"{what} was asked of an engine that does not run: call start first")
        number = self._restarts.num_starts
        try:
            return await self._thread.call(coroutine, self.timeout_s)
        except TimeoutError:
            raise EngineError(self._words(f"{what} took longer than {self.timeout_s:g} s")) from None
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # a coroutine runs in a task
                raise
            raise EngineLostError(self._words(f"{what} was cut off by a restart"), number) from None
        except EngineError:
            raise
        except Exception as error:  # vLLM's errors have many types; each ends the run with the end of its log
            words = self._words(f"vLLM failed at {what} ({type(error).__name__}: {error})")
            raise (EngineLostError(words, number) if has_ended(error) else EngineError(words)) from error

    async def _start(self, arguments: dict[str, Any]) -> Any:
        assert self._spec is not None
        os.environ.pop(OVERRIDING_VARIABLE, None)
        for name, value in VLLM_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args = AsyncEngineArgs(
            **arguments,
            enable_lora=self.serves_lora,
            max_loras=1,
            worker_extension_cls=WORKER_EXTENSION,
            enable_sleep_mode=self._spec.sleeps and torch.cuda.is_available(),  # refused on a CPU
        )
        # In no local variable: a library imported above keeps this frame alive, and with it what it names.
        # Tensor parallelism takes GPUs beside the trainer's, so all stay visible then.
        spec, shares = self._spec, self.settings.tensor_parallel_size > 1
        environment = worker_environment(spec.local_rank, spec.num_local_ranks, None if shares else spec.device_index)
        environment |= socket_environment(self._scratch)
        with changed_environment(environment):
            return AsyncLLM.from_engine_args(args)

    async def _generate(self, prompt_ids: list[int], sampling: SamplingParams) -> Completion:
        from vllm import TokensPrompt

        self._check_awake()
        assert self._spec is not None
        params, request_id = to_vllm(sampling), str(next(self._request_ids))
        async with self._loading:  # what would resume the engine must not do so while weights are being loaded
            pass
        if not self._in_flight:
            self._pause = asyncio.ensure_future(hold(self._llm))
            self._resume = asyncio.ensure_future(self._resume_when_settled(self._pause))
            self._resume.add_done_callback(lambda task: task.cancelled() or task.exception())  # the requests say it
        self._in_flight.add(request_id)
        try:
            assert self._pause is not None
            await asyncio.shield(self._pause)
            stream = self._llm.generate(
                TokensPrompt(prompt_token_ids=prompt_ids), params, request_id, lora_request=self._lora_request
            )
            async for output in stream:
                final = output.outputs[0]
        finally:
            self._in_flight.remove(request_id)
        return to_completion(final)

    async def _resume_when_settled(self, pause: "asyncio.Future[None]") -> None:
        await asyncio.shield(pause)
        for _ in range(round(MAX_SETTLE_S / SETTLE_S)):
            num_in_flight = len(self._in_flight)
            await asyncio.sleep(SETTLE_S)
            if len(self._in_flight) == num_in_flight:
                break
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._llm.resume_generation(), MAX_SETTLE_S)

    async def _load(self, path: Path, version: int) -> None:
        assert self._spec is not None
        check_version_file(path, version)
        self._check_awake()
        if not self._spec.loads_in_flight:
            if self._in_flight:
                raise EngineError(
                    f"{len(self._in_flight)} requests are in flight: weights change only between requests"
                )
            await self._replace_weights(path, version)
            return
        async with self._loading:
            if self._resume is not None:
                await asyncio.wait([self._resume])
            await self._llm.pause_generation(mode="keep", clear_cache=False)  # what is in flight stays where it is
            await self._replace_weights(path, version)
            await self._llm.resume_generation()

    async def _replace_weights(self, path: Path, version: int) -> None:
        assert self._spec is not None
        if self.serves_lora:
            await self._serve_adapter(path)
        else:
            # A run trains the same layers at every step, so what they do not reach stays as the first load left it.
            arguments = (self._spec.model.folder, str(path), self._version >= 0)
            await self._llm.collective_rpc("load_trained_weights", args=arguments)
        # Cached keys and values are those of the old weights; requests in flight compute theirs again.
        if not await self._llm.reset_prefix_cache(reset_running_requests=self._spec.loads_in_flight):
            raise EngineError(
                "vLLM did not reset its prefix cache: it would go on with the old weights' keys and values"
            )
        await self._llm.update_weight_version(str(version))  # which it says of every token from now on
        self._version = version

    async def _sleep(self) -> None:
        if self._in_flight:
            raise EngineError(f"{len(self._in_flight)} requests are in flight: vLLM sleeps only between requests")
        if self._resume is not None:
            await asyncio.wait([self._resume])  # it would start vLLM's scheduler without its memory
        self._is_asleep = True
        if self.serves_lora:
            await self._llm.sleep(level=1)
        else:
            self._version = -1
            await self._llm.update_weight_version(str(self._version))
            await self._llm.sleep(level=2)

    async def _wake(self) -> None:
        if not await self._llm.wake_up():
            raise EngineError(self._words("vLLM did not take all of its memory back"))
        self._is_asleep = False

    def _check_awake(self) -> None:
        if self._is_asleep:
            raise EngineError("the engine is asleep: call wake first")

    async def _serve_adapter(self, path: Path) -> None:
        from vllm.lora.request import LoRARequest

        assert self._spec is not None
        if not is_adapter(path):
            raise EngineError(f'{path} is no adapter, and sync_mode is "lora": use "merge" for whole weights')
        rank = adapter_rank(path)
        if rank > self._spec.model.lora_rank:
            raise EngineError(
                f"the adapter has r={rank}, and the engine was started for the policy's r={self._spec.model.lora_rank}"
            )
        request = LoRARequest("policy", ADAPTER_ID, str(path), load_inplace=True)
        if not await self._llm.add_lora(request):
            raise EngineError(self._words(f"vLLM did not load the adapter in {path}"))
        # Requests name the loaded adapter and must not load it once more.
        self._lora_request = LoRARequest("policy", ADAPTER_ID, str(path))

    def _stop_loop(self, wait_s: float) -> None:
        assert self._thread is not None
        self._thread.stop(wait_s)
        self._llm, self._thread, self._lora_request, self._version = None, None, None, -1
        self._pause, self._resume, self._is_asleep = None, None, False
        self._in_flight, self._loading = set(), asyncio.Lock()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _words(self, what: str) -> str:
        assert self._spec is not None
        return f"{what}. The end of {self._spec.log_file}:\n{tail(self._spec.log_file)}"
