"""Writes a model to a GGUF file: settings, tokenizer and weights, as llama.cpp names and stores them."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quant_shape_to_byte_shape
from transformers import AutoConfig, PretrainedConfig

from fuchsia_pl.cli.gguf_tokenizer import add_tokenizer
from fuchsia_pl.cli.trained import Trained
from fuchsia_pl.engines.merge import checkpoint_weights, merged_weights
from fuchsia_pl.types import ConfigError

F32 = gguf.GGMLQuantizationType.F32
# Type of the matrices by its name. Vectors are always float32, as llama.cpp requires.
TYPES = {
    "f32": (F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
OTHER_WAY = "Export --to merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py"


def write_gguf(trained: Trained, file: Path, quantize: str) -> None:
    """Writes merged weights to a GGUF file. One tensor at a time is in memory.

    Args:
        trained: The weights. The sum W + scale B A is computed in float32 and rounded once, to the type of the file.
        file: The new file.
        quantize: A name in `TYPES`.

    Raises:
        ConfigError: The architecture or the tokenizer is not supported, or the adapter is for another model.
    """
    config = AutoConfig.from_pretrained(trained.base)
    architecture = check_architecture(config)
    kind, file_type = TYPES[quantize]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        _add_settings(writer, config, architecture)
        _add_origin(writer, trained)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, trained.tokenizer, config.vocab_size)
        names = _Names(config, architecture)
        source = trained.base if trained.is_adapter else trained.weights
        for name, tensor in names.of(checkpoint_weights(source)):
            own = _own_kind(tuple(tensor.shape), kind)
            shape = quant_shape_to_byte_shape(tuple(tensor.shape), own)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), prod(shape), raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in names.of(merged_weights(trained.base, trained.weights)):
            writer.write_tensor_data(_stored(name, tensor, config, architecture, kind))
    except ConfigError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{trained.weights} cannot be written as GGUF: {error}") from error
    finally:
        writer.close()


def check_architecture(config: PretrainedConfig) -> gguf.MODEL_ARCH:
    """The architecture of a model in GGUF.

    Raises:
        ConfigError: It is not supported, or has settings that the file could not hold.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"models of the architecture {kind!r} cannot be written as GGUF here, only those of {', '.join(ARCHITECTURES)}. "
            f"{OTHER_WAY}"
        )
    settings = config.to_dict()
    rope = settings.get("rope_parameters") or {}
    found = {
        "rope_type": rope.get("rope_type", "default") not in (None, "default"),
        "hidden_act": settings.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(settings.get("mlp_bias")),
        "attention_bias": bool(settings.get("attention_bias")),
        "use_sliding_window": bool(settings.get("use_sliding_window")),
    }
    unusual = [name for name, is_unusual in found.items() if is_unusual]
    if unusual:
        values = ", ".join(f"{name}={rope[name] if name == 'rope_type' else settings[name]!r}" for name in unusual)
        raise ConfigError(f"a model with {values} cannot be written as GGUF here. {OTHER_WAY}")
    return ARCHITECTURES[kind]


class _Names:
    """Names of tensors in GGUF.

    Args:
        config: Config of the model.
        architecture: Its architecture.
    """

    def __init__(self, config: PretrainedConfig, architecture: gguf.MODEL_ARCH) -> None:
        self._map = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        self._is_tied = bool(config.tie_word_embeddings)

    def of(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors with their new names, without those that follow from others.

        Raises:
            ConfigError: A tensor has no place in the file.
        """
        for name, tensor in weights:
            if name.endswith("rotary_emb.inv_freq") or (self._is_tied and name == "lm_head.weight"):
                continue
            own = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
            if own is None:
                raise ConfigError(f"the weight {name} has no name in GGUF. {OTHER_WAY}")
            yield own, tensor


def _add_settings(writer: gguf.GGUFWriter, config: PretrainedConfig, architecture: gguf.MODEL_ARCH) -> None:
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_origin(writer: gguf.GGUFWriter, trained: Trained) -> None:
    owner, _, name = trained.base_id.rpartition("/")
    writer.add_name(trained.name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, name)
    if owner:
        writer.add_base_model_organization(0, owner)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{trained.base_id}")
    license_name = trained.facts.license
    if license_name is not None:
        writer.add_license(license_name)


def _own_kind(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """The type of a tensor: float32 for a vector, float16 for rows that blocks do not fill."""
    if len(shape) < 2:
        return F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _stored(
    name: str,
    tensor: torch.Tensor,
    config: PretrainedConfig,
    architecture: gguf.MODEL_ARCH,
    kind: gguf.GGMLQuantizationType,
) -> np.ndarray[Any, Any]:
    """The bytes of a tensor."""
    values = tensor.float()
    if architecture is gguf.MODEL_ARCH.LLAMA and ".attn_q." in name:
        values = interleaved(values, config.num_attention_heads)
    if architecture is gguf.MODEL_ARCH.LLAMA and ".attn_k." in name:
        values = interleaved(values, config.num_key_value_heads)
    own = _own_kind(tuple(values.shape), kind)
    limit = float(np.finfo(np.float16).max) if own is gguf.GGMLQuantizationType.F16 else float("inf")
    if not (values.abs() <= limit).all() or not torch.isfinite(values).all():
        raise ConfigError(
            f"the tensor {name} has values that {own.name} cannot hold: set another --quantize, such as f32"
        )
    return gguf.quants.quantize(values.numpy(), own)


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a projection in the order of llama.cpp, which rotates neighbouring rows of a head.

    transformers rotates row i of a head with row i + d/2.

    Args:
        weight: Weight of the projection to queries or keys, [heads * d, H].
        num_heads: Number of heads.

    >>> interleaved(torch.arange(4).unsqueeze(1), num_heads=1).flatten().tolist()
    [0, 2, 1, 3]
    """
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()
