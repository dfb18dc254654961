"""Checkpoint-format weights with an adapter merged in, always computed from the pristine files."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    """Whether a folder contains a PEFT adapter; else it contains whole weights."""
    return (folder / ADAPTER_CONFIG).exists()


def adapter_rank(folder: Path) -> int:
    """The rank of a PEFT adapter folder."""
    return int(json.loads((folder / ADAPTER_CONFIG).read_text())["r"])


def adapter_scale(folder: Path) -> float:
    """Factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA.

    Raises:
        ValueError: The adapted layers store their weights transposed (GPT-2's Conv1D).
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    if config.get("fan_in_fan_out"):
        raise ValueError(
            'the adapter is for layers with transposed weights (fan_in_fan_out), which "merge" cannot serve'
        )
    divisor = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return config["lora_alpha"] / divisor


def checkpoint_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Iterates over the tensors of a model folder's safetensors files, with their checkpoint names.

    Raises:
        FileNotFoundError: The folder has no such files.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        # Some repositories contain a second copy of the weights in files that the index does not list.
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    elif (folder / SAFE_WEIGHTS_NAME).exists():
        files = [folder / SAFE_WEIGHTS_NAME]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"the model folder {folder} has no .safetensors files")
    for file in files:
        with safe_open(str(file), framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - a file handle, not a mapping
                yield name, stream.get_tensor(name)


def block_of(name: str) -> str:
    """The block of a weight: its name up to the first number. A weight outside all blocks is a separate block.

    >>> block_of("model.layers.3.self_attn.q_proj.weight"), block_of("model.norm.weight")
    ('model.layers.3', 'model.norm.weight')
    """
    parts = name.split(".")
    return ".".join(parts[: next((i for i, part in enumerate(parts) if part.isdigit()), len(parts)) + 1])


def merged_weights(
    model_folder: Path, trained_folder: Path, only_reached: bool = False, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """W + scale * B A for every adapted weight, W for the others. Whole weights are returned unchanged.

    The sum is in float32. The engine rounds it once, to the served type; the checkpoint's type may be coarser.

    Args:
        model_folder: The base model.
        trained_folder: A PEFT adapter folder, or a whole model folder.
        only_reached: Leave out blocks without an adapted weight, and the embeddings. Engines store several weights of a
            block in one tensor, so a block is whole or absent.
        device: Device of the sums. A vLLM worker on a GPU computes on a single CPU thread while it serves.

    Yields:
        Checkpoint name and tensor: sums on `device`, unchanged weights on the CPU.

    Raises:
        ValueError: The adapter has weights for layers that the checkpoint lacks.
    """
    if not is_adapter(trained_folder):
        yield from checkpoint_weights(trained_folder)
        return
    scale = adapter_scale(trained_folder)
    factors = load_file(str(trained_folder / ADAPTER_WEIGHTS))
    unused = set(factors)
    reached = {block_of(name.removeprefix(PEFT_PREFIX).partition(".lora_")[0] + ".weight") for name in factors}
    for name, weight in checkpoint_weights(model_folder):
        layer = PEFT_PREFIX + name.removesuffix(".weight")
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        if only_reached and block_of(name) not in reached:
            continue
        if a not in factors:
            yield name, weight
            continue
        unused -= {a, b}
        of_base, of_b, of_a = (tensor.to(device, torch.float32) for tensor in (weight, factors[b], factors[a]))
        # Not in place: a float32 weight on the CPU shares its memory with the file.
        yield name, torch.addmm(of_base, of_b, of_a, alpha=scale)
    if unused:
        raise ValueError(
            f"the checkpoint {model_folder} has no weights for these parts of the adapter: {sorted(unused)[:4]}"
        )
