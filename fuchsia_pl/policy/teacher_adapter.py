"""The adapter of a teacher: a second, frozen LoRA adapter on the policy's base model.

It is no part of the policy's modules: its tensors are kept here, and forward hooks add them while the teacher computes. So code
that lists, saves, shards, hashes or serves the policy's weights need not leave them out, and no switch of adapters changes which
weights are trained.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from fuchsia_pl.policy.adapter import adapted_as, finite_weights, read_adapter
from fuchsia_pl.policy.model_folder import blank_model

SETTING = "data.teacher.adapter"
# PEFT's names in a file: PREFIX, the layer, and DOWN or UP.
PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LayerUpdate:
    """The low-rank update of a linear layer, scale * B A.

    Attributes:
        down: A, float32 [r, number of inputs].
        up: B, float32 [number of outputs, r].
        scale: alpha / r, or alpha / sqrt(r).

    >>> update = LayerUpdate(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), scale=0.5)
    >>> update.add(torch.tensor([[1.0, 1.0]]), torch.tensor([[10.0]]))  # 10 + 0.5 * 3 * (1 + 2)
    tensor([[14.5000]])
    """

    down: Tensor
    up: Tensor
    scale: float

    def add(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The layer's outputs with the update, computed in the same types and in the same order as PEFT does.

        Args:
            inputs: [..., number of inputs].
            outputs: Outputs of the layer without the update, [..., number of outputs].
        """
        if not torch.is_autocast_enabled(inputs.device.type):  # else autocast chooses the type of each product
            inputs = inputs.to(self.down.dtype)
        update = linear(linear(inputs, self.down), self.up) * self.scale
        return (outputs + update).to(outputs.dtype)

    def to(self, device: torch.device) -> "LayerUpdate":
        """The update with its tensors on a device."""
        return LayerUpdate(self.down.to(device), self.up.to(device), self.scale)


class TeacherAdapter:
    """The adapter of a folder.

    Args:
        folder: A PEFT folder, whose rank and layers may differ from those of the policy's adapter.
        model_folder: Folder of the base model.

    Raises:
        ConfigError: The folder holds no plain LoRA adapter for this model, or one with values that are not finite.
    """

    def __init__(self, folder: str, model_folder: str | Path) -> None:
        scales = layer_scales(folder, model_folder)
        tensors = finite_weights(SETTING, folder)
        self._updates = {
            layer: LayerUpdate(
                tensors[f"{PREFIX}{layer}{DOWN}"].float(), tensors[f"{PREFIX}{layer}{UP}"].float(), scale
            )
            for layer, scale in scales.items()
        }

    @contextmanager
    def applied(self, model: PreTrainedModel, device: torch.device) -> Iterator[None]:
        """Within this context, the layers of a model compute with the teacher's update.

        Args:
            model: The base model. An adapter inside it should be disabled.
            device: Device of the forward pass.
        """
        self._updates = {layer: update.to(device) for layer, update in self._updates.items()}
        with ExitStack() as hooks:
            for layer, update in self._updates.items():
                hooks.callback(model.get_submodule(layer).register_forward_hook(_adding(update)).remove)
            yield


def layer_scales(folder: str, model_folder: str | Path) -> dict[str, float]:
    """Checks the adapter of a folder against the model, without loading either.

    Returns:
        The scale of the update of each adapted layer, by the layer's name in the model.

    Raises:
        ConfigError: The folder holds no plain LoRA adapter for this model.
    """
    found = read_adapter(SETTING, folder)
    found.base_model_name_or_path = None  # PEFT warns if it differs from the model
    adapted = adapted_as(blank_model(model_folder), found, SETTING, folder)
    return {
        name.removeprefix(PREFIX): module.scaling["default"]
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def _adding(update: LayerUpdate) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        return update.add(inputs[0], outputs)

    return hook
