"""Loads the base model and checks that its files and its weights match one to one."""

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from fuchsia_pl.policy.adapter import add_adapter
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.critic import Critic
from fuchsia_pl.progress import progress
from fuchsia_pl.types import ConfigError


def load_base(
    folder: str | Path,
    dtype: torch.dtype,
    quantization: Literal["nf4"] | None = None,
    device: Literal["cpu", "meta"] | None = None,
) -> PreTrainedModel:
    """Loads a model folder.

    Args:
        folder: Returned by `resolve_model`.
        dtype: Type of the weights.
        quantization: "nf4" keeps them in 4 bits.
        device: Target device; "meta" keeps names and shapes only. None leaves the choice to transformers.

    Raises:
        ConfigError: A file is broken, or its tensors do not match the model's weights.
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
    with progress.activity("loading the model") if device != "meta" else nullcontext():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                quantization_config=settings,
                device_map=device,
                ignore_mismatched_sizes=True,  # they are then in the report
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"the model in {folder} cannot be loaded: {str(error).splitlines()[0]}. Download or save it again"
            ) from error
    _check_report(folder, report)
    if model.config.get_text_config().to_dict().get("attn_logit_softcapping"):
        model.set_attn_implementation(
            "eager"
        )  # transformers' other kinds of attention leave the soft cap of scores out
    return model


def _check_report(folder: str | Path, report: dict[str, set]) -> None:
    """Rejects faults that transformers only warns of: a weight without a tensor, or a tensor without a weight."""
    reshaped = sorted(str(name[0]) if isinstance(name, tuple) else str(name) for name in report["mismatched_keys"])
    faults = {
        "its files lack {} of the model's weights, the first is {}": sorted(report["missing_keys"]),
        "its files hold {} tensors that the model does not have, the first is {}": sorted(report["unexpected_keys"]),
        "{} tensors of its files have another shape than in the model, the first is {}": reshaped,
    }
    found = [text.format(len(names), names[0]) for text, names in faults.items() if names]
    if found:
        raise ConfigError(
            f"the model in {folder} does not match its config.json: {'; '.join(found)}. Download or save it again"
        )


def check_quantization(quantization: Literal["nf4"] | None) -> None:
    """Rejects 4-bit weights if the machine cannot compute with them.

    Raises:
        ConfigError: There is no CUDA device, or bitsandbytes is not installed.
    """
    if quantization is not None and not torch.cuda.is_available():
        missing = "a CUDA device, and torch finds none"
    elif quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        missing = "bitsandbytes, which is not installed"
    else:
        return
    raise ConfigError(f'model.policy.quantization="{quantization}" needs {missing}: leave it out, or provide that')


def trained_shapes(config: PolicyConfig, folder: str | Path, with_critic: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a `Policy` would train, computed on the meta device.

    This also checks the files of the model and of the adapter in `init_from`.

    Args:
        config: The policy's settings.
        folder: Folder of the model.
        with_critic: Whether a critic is trained as well.

    Returns:
        Shape by name, as in `Policy.named_parameters`.

    Raises:
        ConfigError: The files of the model or of the adapter do not match the config.
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
