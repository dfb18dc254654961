"""Files of an exported adapter that name its base model."""

import json
from pathlib import Path
from typing import Any

from fuchsia_pl.types import ConfigError

ADAPTER_CONFIG = "adapter_config.json"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The PEFT config of an adapter folder.

    Raises:
        ConfigError: It cannot be read.
    """
    file = folder / ADAPTER_CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): give the folder of a PEFT adapter") from error
    if not isinstance(found, dict) or not isinstance(found.get("r"), int):
        raise ConfigError(f"{file} is not the config of a LoRA adapter: it has no rank r")
    return found


def loading_line(folder: Path) -> str:
    """The line of Python that loads the exported weights of a run.

    Args:
        folder: An adapter folder, or the folder of a whole model.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return f'AutoModelForCausalLM.from_pretrained("{folder}")'
    base = read_adapter_config(folder)["base_model_name_or_path"]
    return f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")'
