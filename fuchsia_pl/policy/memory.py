"""Memory of a rank: a plan in bytes, the bytes that autograd saves, and the settings that reduce them."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fuchsia_pl.engines.base import Engine
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.policy.sharding import local

# Part of the plan that a setting reduces, and the share of it that it saves. Measured on CPU where possible, see the tests.
SAVED_BY = {
    "--model.policy.checkpointing.enabled true": ("activations", 0.8),
    "--trainer.accumulate_grad_batches twice as large, or --model.policy.max_tokens_per_micro_batch half": (
        "activations",
        0.5,
    ),
    "--data.engine.init_args.kv_cache_gb half": ("kv_cache", 0.5),
    "--model.policy.quantization nf4": ("base_weights", 0.7),
    "--model.policy.checkpointing.cpu_offloading true": ("activations", 0.9),
    "--hotswap.enabled true": ("smaller_side", 1.0),
    "--model.policy.lora.r half": ("trained", 0.5),
}


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a rank on its device, in bytes.

    Attributes:
        base_weights: Frozen weights, including those of a reference that is a copy.
        trained: Trained weights, their gradients and the two moments of Adam.
        activations: Tensors that autograd saves for the backward of the longest micro-batch.
        engine_weights: The engine's copy of the model.
        kv_cache: Keys and values of the engine.
        available: Memory of the device.
        shares_device: Whether only one of trainer and engine is on the device at a time (HotSwap).

    >>> plan = MemoryPlan(2 * 2**30, 2**28, 3 * 2**30, 2 * 2**30, 4 * 2**30, 16 * 2**30)
    >>> plan.text
    'weights 2.0 GB, trained 0.2, activations 3.0, engine weights 2.0, KV cache 4.0: 11.2 of 16.0 GB'
    >>> from dataclasses import replace
    >>> replace(plan, shares_device=True).text
    'weights 2.0 GB, trained 0.2, activations 3.0, or engine weights 2.0, KV cache 4.0: 6.0 of 16.0 GB'
    """

    base_weights: int
    trained: int
    activations: int
    engine_weights: int
    kv_cache: int
    available: int
    shares_device: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """Bytes of the trainer, and bytes of the engine."""
        return self.base_weights + self.trained + self.activations, self.engine_weights + self.kv_cache

    @property
    def smaller_side(self) -> int:
        """Bytes that a shared device saves."""
        return min(self.sides)

    @property
    def total(self) -> int:
        """Largest number of bytes on the device at a time."""
        return max(self.sides) if self.shares_device else sum(self.sides)

    @property
    def text(self) -> str:
        """The plan in one line."""
        parts = {
            "trained": self.trained,
            "activations": self.activations,
            "or engine weights" if self.shares_device else "engine weights": self.engine_weights,
            "KV cache": self.kv_cache,
        }
        shown = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
        return f"weights {self.base_weights / 2**30:.1f} GB, {shown}: {self.total / 2**30:.1f} of {self.available / 2**30:.1f} GB"

    def savings(self, possible: set[str]) -> list[tuple[str, int]]:
        """The three of the `possible` settings that save most, with the bytes that each saves."""
        saved = [
            (name, int(share * getattr(self, part)))
            for name, (part, share) in SAVED_BY.items()
            if name in possible and not (part == "kv_cache" and self.shares_device)
        ]
        return sorted((entry for entry in saved if entry[1] > 0), key=lambda entry: entry[1], reverse=True)[:3]


class KeptBytes:
    """Counts the bytes that autograd saves inside a `with` block. Each storage counts once; weights of the model do not count."""

    def __init__(self, model: nn.Module) -> None:
        self.num_bytes = 0
        self._model = model
        self._is_sharded = isinstance(model, FSDPModule)
        self._counted: set[int] = set()
        self._weights = self._addresses()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if self._is_sharded and address not in self._counted:
            # FSDP gathers the weights of a block only while it computes that block.
            self._weights = self._addresses()
        if address not in self._weights | self._counted:
            self._counted.add(address)
            self.num_bytes += tensor.untyped_storage().nbytes()
        return tensor

    def _addresses(self) -> set[int]:
        return {local(parameter).untyped_storage().data_ptr() for parameter in self._model.parameters()}


def memory_plan(policy: Policy, engine: Engine, num_activation_bytes: int, device: torch.device) -> MemoryPlan:
    """Memory plan of a rank."""
    sizes = {True: 0, False: 0}
    for parameter in policy.parameters():
        sizes[parameter.requires_grad] += local(parameter).nbytes
    sizes[False] += sum(local(weight).nbytes for weight in policy.reference_weights())
    served = policy.causal_lm.num_parameters()  # counts weights that are packed in 4 bits correctly
    return MemoryPlan(
        base_weights=sizes[False],
        trained=4 * sizes[True],
        activations=num_activation_bytes,
        engine_weights=int(served * getattr(torch, policy.config.dtype).itemsize * engine.weights_share),
        kv_cache=engine.kv_cache_bytes,
        available=device_memory(device),
    )


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out_of_memory(exception: BaseException) -> bool:
    """Whether torch ran out of memory. On a CPU it raises a plain RuntimeError."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(exception, torch.OutOfMemoryError | MemoryError) or (
        isinstance(exception, RuntimeError) and any(word in str(exception) for word in words)
    )


def possible_savings(policy: Policy, device: torch.device, can_share_device: bool) -> set[str]:
    """Settings that would save memory on this device and are not set yet."""
    config = policy.config
    is_gpu, with_adapter = device.type != "cpu", config.lora.enabled
    checkpointed = config.checkpointing.enabled
    idle = {
        "--model.policy.checkpointing.enabled true": checkpointed,
        "--model.policy.quantization nf4": not (is_gpu and with_adapter) or config.quantization is not None,
        "--model.policy.checkpointing.cpu_offloading true": not (is_gpu and checkpointed)
        or config.checkpointing.cpu_offloading,
        "--hotswap.enabled true": not (is_gpu and can_share_device),
        "--model.policy.lora.r half": not with_adapter,
    }
    return {name for name in SAVED_BY if not idle.get(name, False)}
