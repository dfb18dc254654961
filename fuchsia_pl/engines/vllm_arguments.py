"""What vLLM is told at its start, beside the trainer as well as in a server of its own."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fuchsia_pl.engines.base import EngineSpec
from fuchsia_pl.types import ConfigError, ServedModel

Quantization = Literal["int8", "fp8"]

# The ranks for which vLLM has buffers; others are rounded up (vllm.config.lora.MaxLoRARanks).
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_QUANTIZATION: dict[Quantization, str] = {"int8": "int8_per_channel_weight_only", "fp8": "fp8_per_tensor"}
# Siblings share whole blocks of their prompt, and with vLLM's 128 tokens on a CPU most prompts have none.
CPU_BLOCK_SIZE = 32
# Without chunked prefill a prompt must fit into one batch; shorter ones share it.
MIN_BATCHED_TOKENS = 2048
GIB = 2**30
# With the cache's size given, the share of a GPU's memory decides nothing but whether vLLM starts: so much must be free. By its
# default nothing else could be on the GPU.
FREE_SHARE = 0.05
# What a server holds: the newest adapter and the one before it, whose requests may still run.
NUM_SERVED_ADAPTERS = 2

# vLLM leaves a core to the process that asks it, which has nothing to do until the answers come.
VLLM_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
# Where it is set, kv_cache_gb would do nothing.
OVERRIDING_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
CORES_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True)
class VLLMSettings:
    """What a user sets of vLLM; see `VLLMColocatedEngine`.

    Attributes:
        kv_cache_gb: Memory for keys and values, in GiB.
        max_num_seqs: Requests that are decoded at the same time.
        enforce_eager: Whether compilation is skipped.
        quantization: Of the served weights.
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
    """The arguments that a colocated and a served vLLM have in common, under the names of `vllm.EngineArgs`.

    Args:
        settings: What the user sets.
        model: What trainer and vLLM share.
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
        # A seeded request kills the CPU worker when its prefill is chunked, so every prompt must fit into one batch.
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
        # Nothing of the model's own generation config, and logprobs at the temperature that was sampled with.
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "seed": seed,
        "disable_log_stats": True,
    }


def worker_environment(local_rank: int, num_local_ranks: int, device_index: int | None) -> dict[str, str | None]:
    """The variables with which vLLM's processes beside one of several ranks start; None removes one.

    Each gets its rank's GPU, which it would otherwise take to be the first (untested on a GPU), or its rank's share of the cores.

    Args:
        local_rank: The rank among those on this machine.
        num_local_ranks: Number of those.
        device_index: Which of the visible GPUs the trainer has, None on a CPU.
    """
    # torchrun says with it that its own store is to be used, and vLLM's workers, who make theirs, would wait for it.
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
    """Sets variables, or removes those with None, for the processes that are started inside the `with` block."""
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
    """The same arguments as a command line of vLLM's; what is None is left to vLLM.

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
    """Refuses what vLLM beside a trainer cannot do.

    Args:
        settings: How vLLM is started.
        sync_mode: As configured.
        serves_lora: Whether vLLM applies the adapter itself.
        spec: The run's.

    Raises:
        ConfigError: Mode "lora" without an adapter, quantized weights that would have to be merged into, or several ranks that
            would each need several devices.
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
