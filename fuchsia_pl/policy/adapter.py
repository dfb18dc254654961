"""The LoRA adapter of a policy: a fresh one, or one loaded from a folder."""

import math
from pathlib import Path

import peft
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import PreTrainedModel

from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.sources import base_id
from fuchsia_pl.policy.targets import check_targets
from fuchsia_pl.policy.tensor_files import first_difference, shapes_in_file
from fuchsia_pl.types import ConfigError

INIT_FROM = "model.policy.lora.init_from"
# Fields of a PEFT config that a plain adapter may set: its origin, its layers, how it is trained. Every other field changes the
# map W + scale * B A, and an engine computes nothing else.
PLAIN_FIELDS = {
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "ephemeral_gpu_offload"),
}
# Other initialisations change the base weights.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def add_adapter(model: PreTrainedModel, config: PolicyConfig) -> peft.PeftModel:
    """Wraps a model with an adapter in float32, fresh (B = 0) or loaded; everything else is frozen.

    Raises:
        ConfigError: The adapter would reach the embeddings or the output head, which vLLM does not serve, or the loaded one
            does not match the config.
    """
    lora = config.lora
    found = check_adapter(lora)
    adapted = _fresh_adapter(model, lora) if found is None else _loaded_adapter(model, lora, found)
    # PEFT records the local folder. An exported adapter is more useful with a name that resolves on other machines.
    adapted.peft_config["default"].base_model_name_or_path = base_id(config.name, config.hub_id)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            raise ConfigError(
                f"model.policy.lora.target_modules={lora.target_modules!r} reaches {type(layer).__name__}, an embedding or the "
                'output head, which vLLM cannot serve: name linear layers inside the blocks, or use "all-linear"'
            )
    return adapted


def _fresh_adapter(model: PreTrainedModel, lora: LoRASettings) -> peft.PeftModel:
    check_targets(model, lora)
    peft_config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
    )
    return peft.get_peft_model(model, peft_config, autocast_adapter_dtype=True)


def _loaded_adapter(model: PreTrainedModel, lora: LoRASettings, found: peft.LoraConfig) -> peft.PeftModel:
    """Loads the adapter of a folder; its dropout is that of the settings."""
    assert lora.init_from is not None
    found.lora_dropout = lora.dropout
    found.inference_mode = False
    found.base_model_name_or_path = None  # PEFT warns if it differs from the model; `add_adapter` sets it
    adapted = adapted_as(model, found, INIT_FROM, lora.init_from)
    if model.device.type != "meta":
        _fill(adapted, lora.init_from)
    return adapted


def adapted_as(model: PreTrainedModel, found: peft.LoraConfig, setting: str, folder: str) -> peft.PeftModel:
    """Wraps a model with fresh weights of an adapter's kind, and compares their names and shapes with the adapter's file.

    PEFT ignores tensors that match no weight, and leaves weights that match no tensor at their initial values, without an
    error.

    Args:
        model: The model; it may be on the meta device.
        found: What `read_adapter` returned.
        setting: The setting that gives the folder, for errors.
        folder: The adapter's folder.

    Raises:
        ConfigError: The adapter does not fit the model.
    """
    try:
        adapted = peft.get_peft_model(model, found, autocast_adapter_dtype=True)
    except (ValueError, TypeError) as error:  # PEFT finds none of its layers, or one that is not linear
        raise ConfigError(f"{setting}={folder!r} does not fit this model: {' '.join(str(error).split())}") from error
    weights = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    file = _weights_file(setting, folder)
    difference = first_difference({name: tuple(w.shape) for name, w in weights.items()}, shapes_in_file(file))
    if difference:
        raise ConfigError(
            f"{setting}={folder!r} does not fit this model: in {file.name}, {difference}. It may belong to another model, or to "
            "other layers"
        )
    return adapted


def _fill(adapted: peft.PeftModel, folder: str) -> None:
    """Loads an adapter's weights and compares each with the file."""
    tensors = finite_weights(INIT_FROM, folder)
    peft.set_peft_model_state_dict(adapted, tensors)
    for name, weight in peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).items():
        if not torch.equal(weight.cpu(), tensors[name].to(weight.dtype)):
            raise ConfigError(f"{INIT_FROM}={folder!r} was loaded wrongly: {name} differs from the file")


def finite_weights(setting: str, folder: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by name, on the CPU.

    Raises:
        ConfigError: A value is not finite.
    """
    tensors: dict[str, torch.Tensor] = peft.load_peft_weights(folder, device="cpu")
    endless = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if endless is not None:
        raise ConfigError(f"{setting}={folder!r} has values in {endless} that are not finite")
    return tensors


def adapter_bytes(setting: str, folder: str) -> int:
    """Memory of the adapter in a folder, in float32.

    Args:
        setting: The setting that gives the folder, for errors.
        folder: The folder.

    Raises:
        ConfigError: It is missing or broken, or its adapter is not a plain LoRA adapter.
    """
    read_adapter(setting, folder)
    return sum(4 * math.prod(shape) for shape in shapes_in_file(_weights_file(setting, folder)).values())


def _weights_file(setting: str, folder: str) -> Path:
    """The weight file that PEFT loads."""
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise ConfigError(
        f"{setting}={folder!r} has an adapter_config.json but neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}: give the "
        "folder that save_pretrained wrote"
    )


def read_adapter(setting: str, folder: str) -> peft.LoraConfig:
    """Reads the PEFT config of the adapter in a folder.

    Args:
        setting: The setting that gives the folder, for errors.
        folder: The folder.

    Raises:
        ConfigError: The folder is missing or broken, or its adapter is not a plain LoRA adapter.
    """
    try:
        if not (Path(folder) / peft.utils.CONFIG_NAME).is_file():  # else PEFT treats the path as a hub id
            raise FileNotFoundError(f"it has no {peft.utils.CONFIG_NAME}")
        found = peft.PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{setting}={folder!r} is not the folder of a PEFT adapter: {error}. Give the folder that save_pretrained or a run "
            "wrote, as runs/NAME/0/adapter"
        ) from error
    unusual = _unusual(found) if isinstance(found, peft.LoraConfig) else [f"peft_type={found.peft_type}"]
    if unusual:
        raise ConfigError(
            f"{setting}={folder!r} is not a plain LoRA adapter, and vLLM serves no other kind: it has {', '.join(unusual)}"
        )
    return found


def check_adapter(lora: LoRASettings) -> peft.LoraConfig | None:
    """Reads the PEFT config of the adapter in `init_from`; None if a fresh one is made.

    Raises:
        ConfigError: The folder is missing or broken, or its adapter does not match the settings.
    """
    if lora.init_from is None:
        return None
    folder = lora.init_from
    found = read_adapter(INIT_FROM, folder)
    wanted = {
        "r": (lora.r, found.r),
        "alpha": (lora.alpha, found.lora_alpha),
        "use_rslora": (lora.use_rslora, found.use_rslora),
    }
    for name, (given, own) in wanted.items():
        if given != own:
            raise ConfigError(
                f"model.policy.lora.{name} is {given}, but the adapter in init_from={folder!r} has {own}: set it to {own}"
            )
    shapes_in_file(_weights_file(INIT_FROM, folder))
    return found


def _unusual(found: peft.LoraConfig) -> list[str]:
    plain, settings = peft.LoraConfig().to_dict(), found.to_dict()
    unusual = {
        name: value
        for name, value in settings.items()
        if name not in PLAIN_FIELDS and value and value != plain.get(name)
    }
    if settings["init_lora_weights"] not in PLAIN_STARTS:
        unusual["init_lora_weights"] = settings["init_lora_weights"]
    return [f"{name}={value!r}" for name, value in unusual.items()]
