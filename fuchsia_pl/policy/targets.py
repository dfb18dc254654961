"""Checks that the target modules of an adapter exist in the model."""

import re
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fuchsia_pl.policy.config import LoRASettings
from fuchsia_pl.types import ConfigError

LINEAR = (nn.Linear, Conv1D)


def check_targets(model: PreTrainedModel, lora: LoRASettings) -> None:
    """Rejects `target_modules` that match no linear layer. PEFT ignores such a name if another one matches.

    Args:
        model: The model without an adapter; it may be on the meta device.
        lora: The settings. With `init_from` nothing is checked: the loaded adapter defines its layers.

    Raises:
        ConfigError: A name matches no layer, or one that is not linear.
    """
    if not lora.enabled or lora.init_from is not None or lora.target_modules == "all-linear":
        return
    modules = dict(model.named_modules())
    for target in [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules:
        matched = _matched(modules, target, is_pattern=isinstance(lora.target_modules, str))
        others = sorted({type(modules[name]).__name__ for name in matched if not isinstance(modules[name], LINEAR)})
        if matched and not others:
            continue
        problem = f"matches {others[0]}, which is not a linear layer" if others else "matches no layer of the model"
        linear = sorted({name.rsplit(".", 1)[-1] for name, module in modules.items() if isinstance(module, LINEAR)})
        raise ConfigError(
            f"model.policy.lora.target_modules: {target!r} {problem}. The linear layers of {type(model).__name__} are "
            f"{', '.join(linear)}; or use all-linear"
        )


def _matched(modules: Mapping[str, nn.Module], target: str, is_pattern: bool) -> list[str]:
    """The modules that PEFT would adapt: by the end of their names, or by a pattern over full names."""
    if is_pattern:
        return [name for name in modules if re.fullmatch(target, name)]
    return [name for name in modules if name == target or name.endswith(f".{target}")]
