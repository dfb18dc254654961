"""Checks from headers alone that the files of a model are complete and describe a model."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fuchsia_pl.types import ConfigError

INDEX_FILE = "model.safetensors.index.json"


def check_weight_files(folder: Path) -> None:
    """Opens every safetensors file of a folder, which reads the header and compares the file's length.

    Raises:
        ConfigError: A file is cut off or of another kind, or a file named in the index is missing.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"the weights in {file} cannot be read ({error}): the file is cut off or of another kind, so copy or download it "
                "again"
            ) from error
    index = folder / INDEX_FILE
    if not index.is_file():
        return
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"the index {index} cannot be read ({error!r}): copy or download it again") from error
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise ConfigError(
            f"the model folder {folder} lacks {missing[0]} ({len(missing)} of {len(named)} weight files are missing): copy or "
            "download the rest"
        )


def blank_model(folder: str | Path) -> PreTrainedModel:
    """Builds the model of a folder on the meta device, without weights.

    Raises:
        ConfigError: Its config.json does not describe a causal language model supported by transformers.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a config.json may hold any value, and model classes check few of them
        words = " ".join(str(error).split())
        raise ConfigError(
            f"the config.json in {folder} describes no causal language model ({type(error).__name__}: {words}): give a folder "
            "written by save_pretrained, of a model that transformers supports"
        ) from error
