"""Arguments and environment variables of vLLM, for an engine beside the trainer and for a server."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fuchsia_pl.engines.base import EngineSpec
from fuchsia_pl.types import ConfigError, ServedModel

Quantization = Literal["int8", "fp8"]

# The LoRA ranks for which vLLM has buffers. Other ranks are rounded up (vllm.config.lora.MaxLoRARanks).
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_QUANTIZATION: dict[Quantization, str] = {"int8": "int8_per_channel_weight_only", "fp8": "fp8_per_tensor"}
# Siblings share whole blocks of their prompt. With vLLM's default of 128 tokens on a CPU most prompts have no whole block.
CPU_BLOCK_SIZE = 32
# Without chunked prefill a prompt must fit into one batch. Shorter prompts share a batch.
MIN_BATCHED_TOKENS = 2048
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


@dataclass(frozen=True)
class VLLMSettings:
    """vLLM settings of the user; see `VLLMColocatedEngine`.

    Attributes:
        kv_cache_gb: Memory for keys and values, in GiB.
        max_num_seqs: Requests that are decoded at the same time.
        enforce_eager: Whether compilation is skipped.
        quantization: Type of the served weights, None for the checkpoint's.
        tensor_parallel_size: Devices that share a copy of the weights.

    Raises:
        ConfigError: A size is not above 0.
    """

    kv_cache_gb: float
    max_num_seqs: int
    enforce_eager: bool
    quantization: Quantization | None
    tensor_parallel_size: int

    def __post_init__(self) -> None:
        sizes = {
            "kv_cache_gb": self.kv_cache_gb,
            "max_num_seqs": self.max_num_seqs,
            "tensor_parallel_size": self.tensor_parallel_size,
        }
        for name, value in sizes.items():
            if value <= 0:
                raise ConfigError(f"data.engine.init_args.{name} must be above 0, got {value}")


def vllm_arguments(settings: VLLMSettings, model: ServedModel, max_length: int, seed: int) -> dict[str, Any]:
    """The common arguments of a colocated and a served vLLM, with the names of `vllm.EngineArgs`.

    Args:
        settings: The user's settings.
        model: The model that trainer and vLLM share.
        max_length: Longest prompt plus completion, in tokens.
        seed: The run's seed.

    Raises:
        ConfigError: Quantized weights on a machine without a GPU.
    """
    quantization = settings.quantization
    if quantization is not None and not torch.cuda.is_available():
        raise ConfigError(
            f'data.engine.init_args.quantization="{quantization}" needs a GPU: vLLM has no kernels for it on a CPU. Leave it out'
        )
    rank = max(model.lora_rank, 1)
    return {
        "model": model.folder,
        "dtype": model.dtype,
        "max_model_len": max_length,
        "max_num_seqs": settings.max_num_seqs,
        # A seeded request kills the CPU worker if its prefill is chunked, so every prompt must fit into one batch.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_length, MIN_BATCHED_TOKENS),
        "enable_prefix_caching": True,
        "block_size": None if torch.cuda.is_available() else CPU_BLOCK_SIZE,
        "kv_cache_memory_bytes": int(settings.kv_cache_gb * GIB),
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
    """
    words: list[str] = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
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
        ConfigError: Mode "lora" without an adapter, mode "merge" with quantized weights, or tensor parallelism with several
            ranks.
    """
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
