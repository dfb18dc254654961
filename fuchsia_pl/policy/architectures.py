"""The architecture of a model from its config.json alone, without weights."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from fuchsia_pl.policy.sources import PACKAGED_MODELS, resolve_model
from fuchsia_pl.types import ConfigError

# The fields of the config.json files that determine sizes, from the hub pages of these ids. `num_parameters` of each is the
# published number: 494,032,768, 1,543,714,304, 3,085,938,688, 7,615,616,512, 596,049,920 and 134,515,008.
_QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_QWEN_1_5B: dict[str, Any] = {
    **_QWEN,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": {
        **_QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN_1_5B,
    "Qwen/Qwen2.5-Math-1.5B": _QWEN_1_5B,
    "Qwen/Qwen2.5-3B-Instruct": {
        **_QWEN,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        **_QWEN,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "PrimeIntellect/Qwen3-0.6B-Reverse-Text-SFT": {
        **_QWEN,
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


def architecture_of(name: str) -> PretrainedConfig:
    """The architecture of a model.

    Args:
        name: `model.policy.name`. Weights are not needed: a folder with only a config.json suffices, and of a hub id only this
            file is fetched. The ids in `KNOWN` need no network. A GGUF file is converted, as at the start of a run.

    Raises:
        ConfigError: There is no such model, or its config.json describes no model.

    >>> architecture_of("Qwen/Qwen2.5-7B-Instruct").hidden_size
    3584
    """
    path = Path(name).expanduser()
    package = name.partition(":")[0]
    known = KNOWN.get(PACKAGED_MODELS[package][1] if package in PACKAGED_MODELS else name)
    if not path.exists() and known is not None:
        return AutoConfig.for_model(**known)
    if path.is_dir():
        return _read(path / "config.json")
    if path.exists() or ":" in name or name.endswith(".gguf") or name.startswith((".", "/", "~")):
        return _read(resolve_model(name) / "config.json")
    return _read(_from_hub(name))


def _read(file: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(str(file))
    except Exception as error:  # a config.json may hold any value
        raise ConfigError(
            f"{file} describes no model ({type(error).__name__}: {' '.join(str(error).split())}): give a folder with the "
            "config.json of a model that transformers supports"
        ) from error


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # an interrupted download raises exceptions of the HTTP library
        raise ConfigError(
            f"the config.json of {name!r} is not in the cache, and the hub did not provide it ({type(error).__name__}). Check "
            "the spelling and the network, or give a folder with that file: --model.policy.name PATH"
        ) from error
