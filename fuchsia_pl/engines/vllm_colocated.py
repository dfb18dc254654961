"""vLLM beside the trainer: an `AsyncLLM` on an event loop in its own thread of this process."""

import asyncio
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
from fuchsia_pl.engines.burst import BurstGate
from fuchsia_pl.engines.merge import adapter_rank, is_adapter
from fuchsia_pl.engines.output import output_to, tail
from fuchsia_pl.engines.restarts import NO_START, Restarts
from fuchsia_pl.engines.vllm_arguments import (
    GIB,
    OVERRIDING_VARIABLE,
    VLLM_ENVIRONMENT,
    Quantization,
    VLLMSettings,
    changed_environment,
    check_mode,
    compile_cache,
    vllm_arguments,
    worker_environment,
)
from fuchsia_pl.engines.vllm_convert import logprobs_of_output, to_completion, to_vllm, to_vllm_scoring
from fuchsia_pl.engines.vllm_engine_args import checked_by_vllm
from fuchsia_pl.engines.vllm_kv_cache import CPU_KV_CACHE_GB, kv_cache_gb
from fuchsia_pl.engines.vllm_processes import (
    end_engine_processes,
    has_ended,
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
PAUSE: dict[str, Any] = {"mode": "keep", "clear_cache": False}  # requests in flight keep their state
WORKER_EXTENSION = "fuchsia_pl.engines.vllm_worker.WorkerExtension"

logger = logging.getLogger(__name__)


class VLLMColocatedEngine(Engine):
    """vLLM beside the trainer. Untested on a GPU.

    Args:
        sync_mode: How trained weights reach vLLM. "lora": vLLM serves the adapter, reloaded in place. "merge": its worker
            rebuilds W + scale B A from the pristine weights; on a CPU a served LoRA costs most of the speed. "auto": merge on
            a CPU or without LoRA, lora on a GPU.
        kv_cache_gb: Memory for keys and values on each device, in GiB. "auto" takes what the GPU has left beside the trainer's
            memory plan, vLLM's weights and 5 % of the GPU, and 4 on a CPU.
        max_num_seqs: Requests that are decoded at the same time.
        enforce_eager: Skip compilation: starts faster, samples slower.
        quantization: "fp8" (a scale per matrix) or "fp8_per_channel" (a scale per row; on GPUs from Ada on), applied to weights
            and activations while the checkpoint loads. The sampled distribution then differs slightly from the trained one, as
            the sampler correction expects. Untested on a GPU.
        tensor_parallel_size: Devices that share a copy of the weights. Above 1 only if the trainer has one rank.
        timeout_s: Bound of the start (which downloads nothing), of each request and of each load of an adapter.
        engine_args: More arguments of `vllm.AsyncEngineArgs`, by their names there: `speculative_config`, `cpu_offload_gb`,
            `attention_backend`, … Those that a setting decides or that would change what is sampled are refused. One that only
            rounds differently, such as `kv_cache_dtype: fp8`, is measured: it is part of `train/logprob_gap`.

    Raises:
        ConfigError: A bound or a size is not above 0, or an argument is refused.
    """

    def __init__(
        self,
        sync_mode: SyncMode = "auto",
        kv_cache_gb: float | Literal["auto"] = "auto",
        max_num_seqs: int = 64,
        enforce_eager: bool = False,
        quantization: Quantization | None = None,
        tensor_parallel_size: int = 1,
        timeout_s: float = 600.0,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        if timeout_s <= 0:
            raise ConfigError(f"data.engine.init_args.timeout_s must be above 0, got {timeout_s}")
        sizes = (kv_cache_gb, max_num_seqs, enforce_eager, quantization, tensor_parallel_size)
        self.settings = VLLMSettings(*sizes, engine_args or {})
        self.sync_mode = sync_mode
        self.timeout_s = timeout_s
        self._version = -1
        self._kv_cache_gb: float | None = None  # of the running engine
        self._thread: LoopThread | None = None
        self._spec: EngineSpec | None = None
        self._llm: Any = None
        self._lora_request: Any = None
        self._gate: BurstGate | None = None
        self._request_ids = itertools.count()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._restarts = Restarts(self._launch, self._load_again, self._end, end_engine_processes)

    @property
    def policy_version(self) -> int:
        """The optimizer step of its weights; see `Engine.policy_version`."""
        return self._version

    @property
    def can_sleep(self) -> bool:
        """Always true. On a CPU vLLM accepts the calls, but keeps its memory."""
        return True

    @property
    def kv_cache_bytes(self) -> int:
        """Memory for keys and values on each device. 0 until a start if the memory left on a GPU decides it."""
        size = self.settings.kv_cache_gb if self._kv_cache_gb is None else self._kv_cache_gb
        if size == "auto":
            size = 0.0 if torch.cuda.is_available() else CPU_KV_CACHE_GB
        return int(size * GIB)

    @property
    def weights_share(self) -> float:
        """Share of the weights on one device. On a CPU all shares are in one memory."""
        return 1 / self.settings.tensor_parallel_size if torch.cuda.is_available() else 1.0

    @property
    def serves_lora(self) -> bool:
        """Whether vLLM applies the adapter itself; else it gets merged weights."""
        assert self._spec is not None, "start comes first"
        if self.sync_mode == "auto":
            return self._spec.model.lora_rank > 0 and torch.cuda.is_available()
        return self.sync_mode == "lora"

    def start(self, spec: EngineSpec) -> None:
        """Starts vLLM and waits until it is ready.

        Raises:
            EngineError: The start failed or took longer than `timeout_s`.
            ConfigError: Mode "lora" without an adapter, quantized weights where they cannot work, several ranks that would
                each need several devices, no memory left for keys and values, or `engine_args` that vLLM does not accept.
        """
        if self._llm is not None:
            return
        self._restarts.start(spec)

    def _launch(self, spec: EngineSpec) -> None:
        self._spec = spec
        model, settings = spec.model, self.settings
        check_mode(settings, self.sync_mode, self.serves_lora, spec)
        served_rank = model.lora_rank if self.serves_lora else 0
        size = kv_cache_gb(settings, model, spec.max_length, served_rank, spec.device_index, spec.reserved_gb)
        arguments = vllm_arguments(settings, model, spec.max_length, spec.seed, size)
        self._kv_cache_gb = size
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
                self._llm, self._gate = llm, BurstGate(partial(llm.pause_generation, **PAUSE), llm.resume_generation)
            except TimeoutError:
                raise EngineError(self._with_log(f"vLLM did not start within {self.timeout_s:g} s")) from None
            except ConfigError:
                raise
            except Exception as error:  # vLLM raises many types at its start; each is reported with the end of its log
                raise EngineError(self._with_log(f"vLLM did not start ({type(error).__name__}: {error})")) from error
            finally:
                if self._llm is None:
                    # A start cannot be interrupted, but it waits for vLLM's processes, and these can be killed. They ignore a
                    # SIGTERM until they are ready, and this process would wait for them at its end. An engine that becomes
                    # ready nevertheless is shut down then.
                    future.add_done_callback(shut_down_late)
                    end_engine_processes()
                    self._stop_loop(CLOSE_TIMEOUT_S if future.done() else 0.0)

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Samples one completion; see `Engine.generate`."""
        return await self._call(self._generate(list(prompt_ids), sampling), "a completion")

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Computes the logprobs of given ids from vLLM's prompt logprobs; see `Engine.score`.

        Raises:
            EngineError: vLLM serves an adapter on a CPU. Its kernels there take one row of prompt logits per request, and a
                batch of several requests ends the engine.
        """
        if self.serves_lora and not torch.cuda.is_available():
            raise EngineError(
                'with sync_mode "lora" vLLM cannot compute logprobs of given ids on a CPU: use sync_mode "merge" there'
            )
        return await self._call(self._score(list(token_ids)), "the logprobs of a row")

    async def load_weights(self, path: Path, version: int) -> None:
        """Serves trained weights; see `Engine.load_weights`."""
        await self._with_restarts(partial(self._load, path, version), "the load of an adapter")
        self._restarts.loaded(path, version)

    async def sleep(self) -> None:
        """Frees the device for the trainer; see `Engine.sleep`. Merged weights are not kept, since a load rebuilds them."""
        await self._with_restarts(self._sleep, "the order to sleep")

    async def wake(self) -> None:
        """Allocates its memory again; see `Engine.wake`."""
        await self._with_restarts(self._wake, "the order to wake")

    async def restart(self, lost: EngineLostError) -> None:
        """Starts vLLM again; see `Engine.restart`."""
        await asyncio.to_thread(self._restarts.restart, lost)

    def _load_again(self, path: Path, version: int) -> None:
        assert self._llm is not None
        load = while_alive(self._llm, partial(self._load, path, version))
        run_blocking(self._order(load, "the load of the kept weights"))

    def close(self) -> None:
        """Ends vLLM's processes and the thread. The next start decides the size of an automatic cache anew."""
        self._restarts.close()
        self._kv_cache_gb = None

    def _end(self) -> None:
        if self._thread is None:
            return
        try:
            if self._llm is not None:
                self._thread.run(shut_down(self._llm, CLOSE_TIMEOUT_S), CLOSE_TIMEOUT_S)
        except Exception:  # closing must not hide what ended the run
            logger.exception("the shutdown of vLLM failed")
        finally:
            self._stop_loop(CLOSE_TIMEOUT_S)
        # AsyncLLM is part of reference cycles, and its finaliser fails during the shutdown of the interpreter.
        gc.collect()

    async def _with_restarts(self, order: Callable[[], Coroutine[Any, Any, None]], what: str) -> None:
        while True:
            try:
                return await self._call(while_alive(self._llm, order), what)
            except EngineLostError as lost:
                await self.restart(lost)

    async def _call(self, coroutine: Coroutine[Any, Any, T], what: str) -> T:
        if self._restarts.is_busy:
            coroutine.close()
            raise EngineLostError(f"{what} was requested while the engine restarts", NO_START)
        return await self._order(coroutine, what)

    async def _order(self, coroutine: Coroutine[Any, Any, T], what: str) -> T:
        if self._llm is None or self._thread is None:
            coroutine.close()
            raise EngineError(f"{what} was requested from an engine that does not run: call start first")
        number = self._restarts.num_starts
        try:
            return await self._thread.call(coroutine, self.timeout_s)
        except TimeoutError:
            raise EngineError(self._with_log(f"{what} took longer than {self.timeout_s:g} s")) from None
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # a coroutine runs in a task
                raise
            raise EngineLostError(self._with_log(f"{what} was interrupted by a restart"), number) from None
        except EngineError:
            raise
        except Exception as error:  # vLLM's errors have many types; each is reported with the end of its log
            message = self._with_log(f"vLLM failed at {what} ({type(error).__name__}: {error})")
            raise (EngineLostError(message, number) if has_ended(error) else EngineError(message)) from error

    async def _start(self, arguments: dict[str, Any]) -> Any:
        assert self._spec is not None
        os.environ.pop(OVERRIDING_VARIABLE, None)
        for name, value in VLLM_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        own = {
            "enable_lora": self.serves_lora,
            "max_loras": 1,
            "worker_extension_cls": WORKER_EXTENSION,
            "enable_sleep_mode": self._spec.sleeps and torch.cuda.is_available(),  # refused on a CPU
        }
        # The engine is in no local variable: a library imported above keeps this frame alive, and with it its variables.
        # Tensor parallelism uses GPUs beside the trainer's, so all of them stay visible.
        spec, shares = self._spec, self.settings.tensor_parallel_size > 1
        environment = worker_environment(spec.local_rank, spec.num_local_ranks, None if shares else spec.device_index)
        environment |= socket_environment(self._scratch) | compile_cache(spec.rank)
        with checked_by_vllm(self.settings.engine_args), changed_environment(environment):
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments, **own))

    async def _generate(self, prompt_ids: list[int], sampling: SamplingParams) -> Completion:
        output = await self._output(prompt_ids, to_vllm(sampling))
        return to_completion(output.outputs[0])

    async def _score(self, token_ids: list[int]) -> tuple[float, ...]:
        if len(token_ids) < 2:
            return ()
        while True:
            output = await self._output(token_ids[:-1], to_vllm_scoring(token_ids))
            logprobs, version = logprobs_of_output(output, token_ids)
            if version == self._version:  # else newer weights were loaded meanwhile
                return logprobs

    async def _output(self, prompt_ids: list[int], params: Any) -> Any:
        """The final `vllm.RequestOutput` of one request."""
        from vllm import TokensPrompt

        assert self._gate is not None
        request_id = str(next(self._request_ids))
        async with self._gate.request():
            stream = self._llm.generate(
                TokensPrompt(prompt_token_ids=prompt_ids), params, request_id, lora_request=self._lora_request
            )
            async for output in stream:
                final = output
        return final

    async def _load(self, path: Path, version: int) -> None:
        assert self._spec is not None
        assert self._gate is not None
        check_version_file(path, version)
        async with self._gate.load(in_flight=self._spec.loads_in_flight):
            await self._replace_weights(path, version)

    async def _replace_weights(self, path: Path, version: int) -> None:
        assert self._spec is not None
        if self.serves_lora:
            await self._serve_adapter(path)
        else:
            # A run trains the same layers at every step, so all other layers stay as the first load left them.
            arguments = (self._spec.model.folder, str(path), self._version >= 0)
            await self._llm.collective_rpc("load_trained_weights", args=arguments)
        # Cached keys and values are those of the old weights. Requests in flight recompute theirs.
        if not await self._llm.reset_prefix_cache(reset_running_requests=self._spec.loads_in_flight):
            raise EngineError(
                "vLLM did not reset its prefix cache: it would continue with the keys and values of the old weights"
            )
        await self._llm.update_weight_version(str(version))  # vLLM reports it with every token from now on
        self._version = version

    async def _sleep(self) -> None:
        assert self._gate is not None
        await self._gate.fall_asleep()
        if self.serves_lora:
            await self._llm.sleep(level=1)
        else:
            self._version = -1
            await self._llm.update_weight_version(str(self._version))
            await self._llm.sleep(level=2)

    async def _wake(self) -> None:
        assert self._gate is not None
        if not await self._llm.wake_up():
            raise EngineError(self._with_log("vLLM did not allocate all of its memory again"))
        self._gate.wake_up()

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
            raise EngineError(self._with_log(f"vLLM did not load the adapter in {path}"))
        # Requests name the loaded adapter and must not load it again.
        self._lora_request = LoRARequest("policy", ADAPTER_ID, str(path))

    def _stop_loop(self, wait_s: float) -> None:
        assert self._thread is not None
        self._thread.stop(wait_s)
        self._llm, self._gate, self._thread, self._lora_request, self._version = None, None, None, None, -1
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _with_log(self, problem: str) -> str:
        assert self._spec is not None
        return f"{problem}. The end of {self._spec.log_file}:\n{tail(self._spec.log_file)}"
