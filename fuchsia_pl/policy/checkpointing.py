"""Activation checkpointing through transformers, and storage of the kept tensors in host memory until backward."""

from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fuchsia_pl.types import ConfigError


def transformer_blocks(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The transformer blocks of a model, in order. In transformers they share one base class."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_blocks(model: PreTrainedModel, every_n_layers: int) -> None:
    """Makes every n-th block of a model keep only its inputs and recompute the rest in backward.

    Raises:
        ConfigError: The model does not support checkpointing.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"model.policy.checkpointing is enabled, but {type(model).__name__} does not support it: set enabled: false"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for number, block in enumerate(transformer_blocks(model)):
        block.gradient_checkpointing = number % every_n_layers == 0


def offloaded() -> AbstractContextManager[None]:
    """Within this context, tensors saved for backward are kept in host memory (torch's `save_on_cpu`).

    With checkpointing these are the inputs of the blocks. Without it they would be every weight and activation.
    """
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
