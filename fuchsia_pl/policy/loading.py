"""The base model from its folder, with every tensor of its files in a weight and every weight from a file."""

import importlib.util
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from fuchsia_pl.policy.adapter import add_adapter
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.critic import Critic
from fuchsia_pl.types import ConfigError


def load_base(
    folder: str | Path,
    dtype: torch.dtype,
    quantization: Literal["nf4"] | None = None,
    device: Literal["cpu", "meta"] | None = None,
) -> PreTrainedModel:
    """Loads a model folder.

    Args:
        folder: What `resolve_model` returned.
        dtype: Type of the weights.
        quantization: "nf4" keeps them in 4 bits.
        device: Where to; "meta" reads the files and keeps names and shapes only. None is transformers' own choice.

    Raises:
        ConfigError: A file is broken, or its tensors are not the model's weights.
    """
    settings = None
    if quantization is not None:
        check_quantization(quantization)
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            quantization_config=settings,
            device_map=device,
            ignore_mismatched_sizes=True,  # so that they are in the report
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"the model in {folder} cannot be loaded: {str(error).splitlines()[0]}. Download or save it again"
        ) from error
    _check_report(folder, report)
    return model


def _check_report(folder: str | Path, report: dict[str, set]) -> None:
    """Refuses what transformers only warns of: a weight at random values, or a tensor that is nowhere in the model."""
    reshaped = sorted(str(name[0]) if isinstance(name, tuple) else str(name) for name in report["mismatched_keys"])
    faults = {
        "its files lack {} of the model's weights, the first is {}": sorted(report["missing_keys"]),
        "its files hold {} tensors that the model does not have, the first is {}": sorted(report["unexpected_keys"]),
        "{} tensors of its files have another shape than in the model, the first is {}": reshaped,
    }
    found = [text.format(len(names), names[0]) for text, names in faults.items() if names]
    if found:
        raise ConfigError(
            f"the model in {folder} is not what its config.json describes: {'; '.join(found)}. Download or save it again"
        )


def check_quantization(quantization: Literal["nf4"] | None) -> None:
    """Refuses 4-bit weights where nothing can compute with them.

    Raises:
        ConfigError: There is no CUDA device, or no bitsandbytes.
    """
    if quantization is not None and not torch.cuda.is_available():
        missing = "a CUDA device, and torch sees none"
    elif quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        missing = "bitsandbytes, which is not installed"
    else:
        return
    raise ConfigError(f'model.policy.quantization="{quantization}" needs {missing}: leave it out, or get that')


def trained_shapes(config: PolicyConfig, folder: str | Path, with_critic: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a `Policy` would train, without the memory for a single one.

    The files of the model and of the adapter to continue from are checked on the way.

    Args:
        config: Which model and which of its weights.
        folder: Where the model lies.
        with_critic: Whether a critic learns beside it.

    Returns:
        Shape by name, as in `Policy.named_parameters`.

    Raises:
        ConfigError: The files of the model or of the adapter are not what the config says.
    """
    base = load_base(folder, getattr(torch, config.dtype), device="meta")
    parts: dict[str, torch.nn.Module] = {"model": add_adapter(base, config) if config.lora.enabled else base}
    if with_critic:
        with torch.device("meta"):
            parts["critic"] = Critic(base.config.get_text_config().hidden_size)
    return {
        name: tuple(parameter.shape)
        for name, parameter in torch.nn.ModuleDict(parts).named_parameters()
        if parameter.requires_grad
    }
