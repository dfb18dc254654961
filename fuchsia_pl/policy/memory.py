"""Memory of a device, the bytes that autograd saves for backward, and errors that mean that memory ran out."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef

from fuchsia_pl.policy.sharding import local


class KeptBytes:
    """Counts the bytes that autograd saves inside a `with` block. Each storage counts once; weights of the model do not count.

    Storages are compared as objects, not by the address of their data, so that fake tensors, which have none, can be counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_bytes = 0
        self._model = model
        self._is_sharded = isinstance(model, FSDPModule)
        self._counted: set[StorageWeakRef] = set()
        self._weights = self._storages()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())
        if self._is_sharded and storage not in self._counted:
            # FSDP gathers the weights of a block only while it computes that block.
            self._weights = self._storages()
        if storage not in self._weights and storage not in self._counted:
            self._counted.add(storage)
            self.num_bytes += tensor.untyped_storage().nbytes()
        return tensor

    def _storages(self) -> set[StorageWeakRef]:
        return {StorageWeakRef(local(parameter).untyped_storage()) for parameter in self._model.parameters()}


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
