"""Arguments and environment variables of vLLM, for an engine beside the trainer and for a server."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fuchsia_pl.engines.base import EngineSpec
from fuchsia_pl.engines.vllm_engine_args import check_engine_args
from fuchsia_pl.types import ConfigError, ServedModel

Quantization = Literal["fp8", "fp8_per_channel"]

# The LoRA ranks for which vLLM has buffers. Other ranks are rounded up (vllm.config.lora.MaxLoRARanks).
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_QUANTIZATION: dict[Quantization, str] = {"fp8": "fp8_per_tensor", "fp8_per_channel": "fp8_per_channel"}
# vLLM refuses a scale per channel on GPUs whose matrix units do not multiply fp8 (before Ada and Hopper).
FP8_CAPABILITY = (8, 9)
# Siblings share whole blocks of their prompt. With vLLM's default of 128 tokens on a CPU most prompts have no whole block.
CPU_BLOCK_SIZE = 32
# Without chunked prefill a prompt must fit into one batch. Shorter prompts share a batch.
MIN_BATCHED_TOKENS = 2048
GPU_BATCHED_TOKENS = 8192
GIB = 2**30
# The size of the cache is given, so this share of a GPU's memory only has to be free at the start. vLLM's default would leave
# no room for the trainer.
FREE_SHARE = 0.05
# A server keeps the newest adapter and the one before it, whose requests may still run.
NUM_SERVED_ADAPTERS = 2

# By default vLLM reserves a core for its client process, which is idle until the answers arrive.
VLLM_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
# If it is set, vLLM ignores kv_cache_gb.
OVERRIDING_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
CORES_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
CACHE_VARIABLE = "VLLM_CACHE_ROOT"


@dataclass(frozen=True)
class VLLMSettings:
    """vLLM settings of the user; see `VLLMColocatedEngine`.

    Attributes:
        kv_cache_gb: Memory for keys and values, in GiB; "auto" takes what the device has left.
        max_num_seqs: Requests that are decoded at the same time.
        enforce_eager: Whether compilation is skipped.
        quantization: Type of the served weights, None for the checkpoint's.
        tensor_parallel_size: Devices that share a copy of the weights.
        engine_args: More arguments of `vllm.AsyncEngineArgs`.

    Raises:
        ConfigError: A size is not above 0, vLLM has no such quantization, or an argument is refused.
    """

    kv_cache_gb: float | Literal["auto"]
    max_num_seqs: int
    enforce_eager: bool
    quantization: Quantization | None
    tensor_parallel_size: int
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes: dict[str, float] = {"max_num_seqs": self.max_num_seqs, "tensor_parallel_size": self.tensor_parallel_size}
        if self.kv_cache_gb != "auto":
            sizes["kv_cache_gb"] = self.kv_cache_gb
        for name, value in sizes.items():
            if value <= 0:
                raise ConfigError(f"data.engine.init_args.{name} must be above 0, got {value}")
        if self.quantization not in (None, *VLLM_QUANTIZATION):
            raise ConfigError(
                f'data.engine.init_args.quantization must be one of {", ".join(VLLM_QUANTIZATION)}, got "{self.quantization}": '
                "vLLM has no other type for weights that it quantizes itself (its int8 leaves all layers but experts unchanged)"
            )
        check_engine_args(self.engine_args)


def vllm_arguments(
    settings: VLLMSettings, model: ServedModel, max_length: int, seed: int, kv_cache_gb: float
) -> dict[str, Any]:
    """The common arguments of a colocated and a served vLLM, with the names of `vllm.EngineArgs`.

    Args:
        settings: The user's settings.
        model: The model that trainer and vLLM share.
        max_length: Longest prompt plus completion, in tokens.
        seed: The run's seed.
        kv_cache_gb: Memory for keys and values on each device, in GiB.
    """
    has_gpu, quantization = torch.cuda.is_available(), settings.quantization
    rank = max(model.lora_rank, 1)
    arguments = {
        "model": model.folder,
        "dtype": model.dtype,
        "max_model_len": max_length,
        "max_num_seqs": settings.max_num_seqs,
        # A seeded request kills the CPU worker if its prefill is chunked.
        "enable_chunked_prefill": has_gpu,
        "max_num_batched_tokens": num_batched_tokens(settings, max_length),
        "enable_prefix_caching": True,
        "block_size": None if has_gpu else CPU_BLOCK_SIZE,
        "kv_cache_memory_bytes": int(kv_cache_gb * GIB),
        "gpu_memory_utilization": FREE_SHARE,
        "enforce_eager": settings.enforce_eager,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "quantization": None if quantization is None else VLLM_QUANTIZATION[quantization],
        "max_lora_rank": min((r for r in VLLM_LORA_RANKS if r >= rank), default=rank),
        # Ignore the model's own generation config. Return logprobs at the sampling temperature.
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "seed": seed,
        "disable_log_stats": True,
    }
    return arguments | dict(settings.engine_args)


def check_quantization(settings: VLLMSettings) -> None:
    """Checks that this machine can quantize the served weights.

    Raises:
        ConfigError: It has no GPU, or none with kernels for the type.
    """
    quantization = settings.quantization
    if quantization is not None and not torch.cuda.is_available():
        raise ConfigError(
            f'data.engine.init_args.quantization="{quantization}" needs a GPU: vLLM has no kernels for it on a CPU. Leave it out'
        )
    if quantization == "fp8_per_channel" and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise ConfigError(
            f'data.engine.init_args.quantization="{quantization}" needs a GPU that multiplies fp8 (compute capability 8.9 or '
            'newer): use "fp8", with which only the weights are quantized on older ones'
        )


def num_batched_tokens(settings: VLLMSettings, max_length: int) -> int:
    """Most tokens of vLLM's forward pass: on a CPU, whose prefill is not chunked, at least those of the longest prompt.

    Args:
        settings: The user's settings.
        max_length: Longest prompt plus completion, in tokens.
    """
    fewest = GPU_BATCHED_TOKENS if torch.cuda.is_available() else max(max_length, MIN_BATCHED_TOKENS)
    # A step that decodes has a token of each request.
    return int(settings.engine_args.get("max_num_batched_tokens", max(fewest, settings.max_num_seqs)))


def compile_cache(rank: int) -> dict[str, str]:
    """Variable that gives every rank but the first its own cache of vLLM, since engines that start together would share one.

    It has the same place at every start, so a rank compiles once. The first rank uses vLLM's own folder, as single ranks do.

    Args:
        rank: Number of the rank among all, since machines may share a home folder.
    """
    if rank == 0:
        return {}
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vllm"
    root = Path(os.environ.get(CACHE_VARIABLE) or default).expanduser()
    return {CACHE_VARIABLE: str(root / f"rank-{rank}")}


def worker_environment(local_rank: int, num_local_ranks: int, device_index: int | None) -> dict[str, str | None]:
    """Environment variables of vLLM's processes beside one of several ranks; None removes a variable.

    Each engine gets the GPU of its rank instead of the first one (untested on a GPU), or its rank's share of the cores.

    Args:
        local_rank: Number of the rank among those on this machine.
        num_local_ranks: Number of ranks on this machine.
        device_index: Index of the trainer's GPU among the visible ones, None on a CPU.
    """
    # torchrun sets it to make its processes use its own store. vLLM's workers create another one and would wait for it.
    changes: dict[str, str | None] = {"TORCHELASTIC_USE_AGENT_STORE": None}
    if device_index is not None:
        visible = os.environ.get(VISIBLE_GPUS)
        changes[VISIBLE_GPUS] = str(device_index) if visible is None else visible.split(",")[device_index]
    if device_index is not None or num_local_ranks == 1:
        return changes
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= num_local_ranks and CORES_VARIABLE not in os.environ:
        changes[CORES_VARIABLE] = ",".join(map(str, cores[local_rank::num_local_ranks]))
    return changes


@contextmanager
def changed_environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Sets variables, or removes those with None, for processes that are started inside the `with` block."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        _set_environment(changes)
        yield
    finally:
        _set_environment(before)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def as_options(arguments: dict[str, Any]) -> list[str]:
    """The same arguments as command-line options of vLLM. Arguments that are None are left out.

    >>> as_options({"max_model_len": 64, "enforce_eager": True, "enable_chunked_prefill": False, "block_size": None})
    ['--max-model-len', '64', '--enforce-eager', '--no-enable-chunked-prefill']
    >>> as_options({"speculative_config": {"method": "ngram"}, "cudagraph_capture_sizes": [1, 2]})
    ['--speculative-config', '{"method": "ngram"}', '--cudagraph-capture-sizes', '1', '2']
    """
    words: list[str] = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, Mapping):
            words += [f"--{option}", json.dumps(value)]
        elif isinstance(value, list | tuple | set):
            words += [f"--{option}", *map(str, value)]
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words


def check_mode(settings: VLLMSettings, sync_mode: str, serves_lora: bool, spec: EngineSpec) -> None:
    """Checks the settings of a vLLM beside the trainer.

    Args:
        settings: The settings of vLLM.
        sync_mode: The configured mode, for the message.
        serves_lora: Whether vLLM applies the adapter itself.
        spec: Settings of the run.

    Raises:
        ConfigError: Mode "lora" without an adapter, quantized weights on a machine without kernels for them or in mode "merge",
            or tensor parallelism with several ranks.
    """
    check_quantization(settings)
    if settings.quantization is not None and not serves_lora:
        raise ConfigError(
            f'data.engine.init_args.quantization="{settings.quantization}" needs sync_mode "lora", got '
            f'"{sync_mode}": trained weights cannot be merged into quantized ones'
        )
    if serves_lora and spec.model.lora_rank == 0:
        raise ConfigError(
            'data.engine.init_args.sync_mode is "lora", but model.policy.lora.enabled is false: use "auto"'
        )
    size = settings.tensor_parallel_size
    if size > 1 and spec.num_ranks > 1:
        raise ConfigError(
            f"data.engine.init_args.tensor_parallel_size={size} needs a trainer of one rank, got {spec.num_ranks}: vLLM's "
            "AsyncLLM starts workers of its own, and the devices they would take hold other ranks and their engines (an "
            "engine is shared over the ranks of a launcher only through vLLM's synchronous LLM). Start `fuchsia serve` with "
            "this setting on other devices, and add --config overlays/server.yaml here"
        )
