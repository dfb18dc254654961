"""vLLM's own arguments that a user may give as `engine_args`, and those that are refused by name, with the reason."""

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fuchsia_pl.types import ConfigError

KEY = "data.engine.init_args.engine_args"
SOURCE, CLASSES = "engine/arg_utils.py", ("EngineArgs", "AsyncEngineArgs")
NUM_NEAR = 3
# A reason is the end of a sentence that begins with the name of the argument.
ENGINE = "data.engine.init_args"
HAS_SETTING = {
    "model": "model.policy.name",
    "dtype": "model.policy.dtype",
    "seed": "seed_everything",
    "max_model_len": "data.sampling.max_length",
    "kv_cache_memory_bytes": f"{ENGINE}.kv_cache_gb",
    "gpu_memory_utilization": f"{ENGINE}.kv_cache_gb",
    "num_gpu_blocks_override": f"{ENGINE}.kv_cache_gb",
    "max_num_seqs": f"{ENGINE}.max_num_seqs",
    "enforce_eager": f"{ENGINE}.enforce_eager",
    "tensor_parallel_size": f"{ENGINE}.tensor_parallel_size",
    "quantization": f"{ENGINE}.quantization",
    "quantization_config": f"{ENGINE}.quantization",
    "allow_deprecated_quantization": f"{ENGINE}.quantization",
    "enable_lora": f"{ENGINE}.sync_mode",
    "max_lora_rank": "model.policy.lora.r",
    "lora_target_modules": "model.policy.lora.target_modules",
    "enable_sleep_mode": "hotswap.enabled",
}
REASONS: dict[str, tuple[str, ...]] = {
    "has one value that works here": (
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "max_loras",
        "worker_extension_cls",
        "disable_log_stats",
        "weight_transfer_config",
    ),
    "would make the engine sample from another distribution than the policy's, or return other logprobs": (
        "generation_config",
        "override_generation_config",
        "logits_processors",
        "logprobs_mode",
        "max_logprobs",
        "watermark_config",
        "reasoning_config",
        "diffusion_config",
        "disable_sliding_window",
        "enable_trace_replay",
    ),
    "would make the engine load another model than the trainer": (
        "tokenizer",
        "tokenizer_mode",
        "skip_tokenizer_init",
        "revision",
        "code_revision",
        "tokenizer_revision",
        "hf_config_path",
        "hf_overrides",
        "model_weights",
        "model_class_overrides",
        "load_format",
        "config_format",
        "default_mm_loras",
        "runner",
        "convert",
        "pooler_config",
    ),
    "would run a checkpoint's own code": ("trust_remote_code",),
    "would keep keys and values of older weights, since a sync clears the prefix cache of the device alone": (
        "kv_transfer_config",
        "kv_offloading_size",
        "kv_offloading_backend",
    ),
    "would use devices of other ranks": (
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "data_parallel_size",
        "data_parallel_size_local",
        "data_parallel_rank",
        "data_parallel_start_rank",
        "data_parallel_hybrid_lb",
        "data_parallel_external_lb",
        "data_parallel_multi_port_external_lb",
        "enable_elastic_ep",
        "device_ids",
        "nnodes",
        "node_rank",
        "distributed_executor_backend",
    ),
}
REFUSED: dict[str, str] = {
    **{name: f"is decided by {setting}" for name, setting in HAS_SETTING.items()},
    **{name: reason for reason, names in REASONS.items() for name in names},
}
# Verification of a draft by rejection samples from the policy's distribution, by either of these methods.
EXACT_REJECTION = ("standard", "block")

# What vLLM raises for its arguments, before it starts processes.
ARGUMENT_ERRORS = (ValueError, TypeError, LookupError, NotImplementedError, AssertionError)


def check_engine_args(engine_args: Mapping[str, Any]) -> None:
    """Checks the names of arguments for vLLM, without importing it.

    Args:
        engine_args: Names of `vllm.AsyncEngineArgs` and their values.

    Raises:
        ConfigError: An argument is refused, or vLLM has none of this name.
    """
    known = argument_names() if engine_args else frozenset()
    for name in engine_args:
        if name in REFUSED:
            raise ConfigError(f"{KEY}.{name} {REFUSED[name]}: leave it out")
        if known and name not in known:
            near = difflib.get_close_matches(name, sorted(known - REFUSED.keys()), NUM_NEAR)
            advice = f"did you mean {' or '.join(near)}?" if near else "see `vllm.AsyncEngineArgs` for the names"
            raise ConfigError(f"{KEY}.{name} is no argument of vLLM: {advice}")
    for name in ("max_num_batched_tokens", "cpu_offload_gb"):  # numbers that are read here too
        value = engine_args.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{KEY}.{name} must be a number, got {value!r}")
    speculative = engine_args.get("speculative_config")
    method = speculative.get("rejection_sample_method") if isinstance(speculative, Mapping) else None
    if method not in (None, *EXACT_REJECTION):
        raise ConfigError(
            f"{KEY}.speculative_config.rejection_sample_method must be one of {', '.join(EXACT_REJECTION)}, got {method!r}: "
            "others accept tokens that the policy would not sample"
        )


@contextmanager
def checked_by_vllm(engine_args: Mapping[str, Any]) -> Iterator[None]:
    r"""Inside the `with` block, raises vLLM's errors for values of these arguments as one line.

    Raises:
        ConfigError: vLLM does not accept its arguments. If the user gave none, its own error is raised.

    >>> try:
    ...     with checked_by_vllm({"cpu_offload_gb": -1}):
    ...         raise ValueError("cpu_offload_gb\n  must be above 0")
    ... except ConfigError as error:
    ...     str(error)[-91:]
    'cpu_offload_gb (ValueError: cpu_offload_gb must be above 0): correct what the message names'
    """
    try:
        yield
    except ARGUMENT_ERRORS as error:
        if not engine_args:
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"vLLM refuses its arguments, among them {KEY} {', '.join(engine_args)} ({type(error).__name__}: {reason}): correct "
            "what the message names"
        ) from error


@functools.cache
def argument_names() -> frozenset[str]:
    """Names of the fields of `vllm.AsyncEngineArgs`, from the source of the installed vLLM; none if there is no such file.

    An import of vLLM would take seconds, and configs are also read on machines without it.
    """
    found = importlib.util.find_spec("vllm")
    file = Path(found.origin).parent / SOURCE if found is not None and found.origin else None
    if file is None or not file.is_file():
        return frozenset()
    classes = (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef))
    fields = (field for node in classes if node.name in CLASSES for field in node.body)
    names = (
        field.target.id for field in fields if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )
    return frozenset(name for name in names if not name.startswith("_"))
