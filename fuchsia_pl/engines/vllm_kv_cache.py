"""Memory for vLLM's keys and values where `kv_cache_gb` is "auto": what a device has left beside trainer and engine."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fuchsia_pl.engines.vllm_arguments import GIB, VLLMSettings, num_batched_tokens
from fuchsia_pl.types import ConfigError, ServedModel

# On a CPU the operating system decides how much memory is free, so "auto" is a constant there.
CPU_KV_CACHE_GB = 4.0
# Share of a device's memory that "auto" leaves free: the allocators of two processes keep blocks that fit no request.
FREE_SHARE = 0.05
# Memory of vLLM's process beside tensors, by its own logs: CUDA context and libraries ("non_torch_memory takes 0.33 to
# 0.39 GiB"), the workspace of FlashInfer (VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE, 394 MiB), and CUDA graphs ("Graph capturing
# finished, took 0.4 to 1.4 GiB"; none if `enforce_eager`).
CONTEXT_GB = 0.5
WORKSPACE_GB = 0.4
GRAPHS_GB = 1.0
MIN_GB = 0.25
LOGITS_BYTES = 3 * 4  # logits of the sampler in float32: given, processed, and their logarithms


def auto_kv_cache_gb(
    free_gb: float, total_gb: float, reserved_gb: float, weights_gb: float, overhead_gb: float
) -> float:
    """What is left of a device for keys and values, rounded down to 0.1.

    Args:
        free_gb: Memory that the trainer and the engine may use, in GiB: what is free, and what the trainer holds already.
        total_gb: All memory of the device, in GiB.
        reserved_gb: Memory that the trainer needs at its peak, in GiB, without its CUDA context.
        weights_gb: The engine's weights, in GiB.
        overhead_gb: The engine's other memory, in GiB; see `overhead_gb`.

    Raises:
        ConfigError: Nothing is left.

    >>> auto_kv_cache_gb(free_gb=78.0, total_gb=80.0, reserved_gb=30.0, weights_gb=15.0, overhead_gb=3.0)
    26.0
    """
    left = free_gb - reserved_gb - weights_gb - overhead_gb - FREE_SHARE * total_gb
    if left < MIN_GB:
        raise ConfigError(
            f'data.engine.init_args.kv_cache_gb is "auto", and nothing is left for it: of {free_gb:.1f} GiB the trainer needs '
            f"{reserved_gb:.1f}, vLLM's weights {weights_gb:.1f} and its other memory {overhead_gb:.1f}, and "
            f"{FREE_SHARE * total_gb:.1f} stay free. Try --hotswap.enabled true, --model.policy.checkpointing.enabled true, a "
            "smaller model or tensor_parallel_size, or give a number"
        )
    return math.floor(10 * left) / 10


def kv_cache_gb(
    settings: VLLMSettings,
    model: ServedModel,
    max_length: int,
    served_rank: int,
    device_index: int | None = None,
    reserved_gb: float = 0.0,
) -> float:
    """Memory for keys and values on each device of an engine, in GiB: the number of the settings, or what is left.

    Args:
        settings: The user's settings.
        model: The served model.
        max_length: Longest prompt plus completion, in tokens.
        served_rank: Rank of the adapter that vLLM applies, 0 for none.
        device_index: Index of the trainer's GPU, None if the engine has its devices for itself.
        reserved_gb: Memory that the trainer needs there; see `EngineSpec`.

    Raises:
        ConfigError: Nothing is left.
    """
    if settings.kv_cache_gb != "auto":
        return settings.kv_cache_gb
    if not torch.cuda.is_available():
        return CPU_KV_CACHE_GB
    if has_draft_model(settings.engine_args):
        raise ConfigError(
            'data.engine.init_args.kv_cache_gb is "auto", which does not include the weights of a draft model: give a number'
        )
    blank = blank_model(model.folder)
    size = settings.tensor_parallel_size
    weights = weights_gb(blank, model.dtype, settings.quantization is not None) / size
    weights = max(weights - settings.engine_args.get("cpu_offload_gb", 0.0), 0.0)
    overhead = overhead_gb(blank, model.dtype, served_rank, num_batched_tokens(settings, max_length), settings)
    left = []
    for index in range(size) if size > 1 else [device_index or 0]:
        free, total = torch.cuda.mem_get_info(index)
        # The peak of the trainer contains what it holds already.
        free += torch.cuda.memory_reserved(index)
        reserved = reserved_gb if index == device_index else 0.0
        left.append(auto_kv_cache_gb(free / GIB, total / GIB, reserved, weights, overhead))
    return min(left)


def has_draft_model(engine_args: Mapping[str, Any]) -> bool:
    """Whether vLLM loads a second model, which proposes tokens.

    >>> has_draft_model({"speculative_config": {"model": "small"}}), has_draft_model({"speculative_config": {"method": "ngram"}})
    (True, False)
    """
    given = engine_args.get("speculative_config")
    name = given.get("model") if isinstance(given, Mapping) else None
    return name not in (None, "ngram", "[ngram]") or engine_args.get("spec_model") is not None


def blank_model(folder: str) -> PreTrainedModel:
    """A model with the shapes of a model folder and without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def weights_gb(blank: PreTrainedModel, dtype: str, is_quantized: bool) -> float:
    """Memory of a model's weights in vLLM, in GiB. Shared weights count once.

    Args:
        blank: The model, with or without memory.
        dtype: Type of the served weights.
        is_quantized: Whether the matrices of the blocks have one byte per weight. Embeddings and head keep their type.
    """
    itemsize = getattr(torch, dtype).itemsize
    in_blocks = sum(layer.weight.numel() for layer in block_layers(blank))
    number = sum(parameter.numel() for parameter in blank.parameters())
    return ((number - in_blocks) * itemsize + in_blocks * (1 if is_quantized else itemsize)) / GIB


def overhead_gb(blank: PreTrainedModel, dtype: str, served_rank: int, num_tokens: int, settings: VLLMSettings) -> float:
    """An estimate of vLLM's memory beside weights, keys and values, in GiB: context, graphs, buffers and activations.

    Args:
        blank: The model, with or without memory.
        dtype: Type of the activations.
        served_rank: Rank of the adapter that vLLM applies, 0 for none. It has buffers for every layer of the blocks.
        num_tokens: Most tokens of a forward pass.
        settings: The user's settings.
    """
    itemsize = getattr(torch, dtype).itemsize
    layers = list(block_layers(blank))
    buffers = served_rank * sum(layer.in_features + layer.out_features for layer in layers) * itemsize
    # The widest matrices are gate and up, computed as one: their results, the product of both, and input and residual.
    widest = max(layer.out_features for layer in layers)
    narrowest = min(layer.in_features for layer in layers)
    activations = num_tokens * (3 * widest + 2 * narrowest) * itemsize
    logits = LOGITS_BYTES * settings.max_num_seqs * blank.config.get_text_config().vocab_size
    graphs = 0.0 if settings.enforce_eager else GRAPHS_GB
    return CONTEXT_GB + WORKSPACE_GB + graphs + (buffers + activations + logits) / GIB


def block_layers(blank: PreTrainedModel) -> list[nn.Linear]:
    """The linear layers of a model without its head."""
    head = blank.get_output_embeddings()
    return [layer for layer in blank.modules() if isinstance(layer, nn.Linear) and layer is not head]
