"""Moves tensors between a device and host memory. What does not change is copied to the host once and only uploaded later."""

import math

import torch
from torch import Tensor

BLOCK_BYTES = 2**30
ALIGNMENT = 256


class HostCopies:
    """Copies of named tensors in host memory, page-locked if there is a GPU. A copy is allocated once and then used again.

    Memory is allocated in blocks, since torch rounds every page-locked allocation up to a power of two.

    Args:
        block_bytes: Size of a block; a larger tensor gets a block of its own size.

    >>> copies, frozen = HostCopies(block_bytes=1024), torch.ones(2)
    >>> on_host = copies.moved("frozen", frozen, torch.device("cpu", 0), changes=False)
    >>> on_device = copies.moved("frozen", on_host, torch.device("meta"), changes=False)
    >>> copies.moved("frozen", on_device, torch.device("cpu"), changes=False) is on_host
    True
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._copies: dict[str, Tensor] = {}
        self._free = torch.empty(0, dtype=torch.uint8)

    @torch.inference_mode(False)  # else weights moved in a validation could not be trained later
    def moved(self, name: str, tensor: Tensor, device: torch.device, changes: bool) -> Tensor:
        """Returns a tensor's values on another device, or the tensor itself if it is there.

        Args:
            name: Always given for this tensor, and for no other one.
            tensor: Any shape and type.
            device: The host, or the device that computes.
            changes: Whether its values on the device may differ from its host copy. If not, they are downloaded only once.
        """
        if tensor.device == device:
            return tensor
        if device.type == "cpu":
            return self._copy(name, tensor, changes)
        source = tensor if changes else self._copy(name, tensor, changes)
        return source.to(device, non_blocking=True)  # later work on the device waits for it

    def _copy(self, name: str, tensor: Tensor, changes: bool) -> Tensor:
        copy = self._copies.get(name)
        is_new = copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype)
        if copy is None or is_new:
            copy = self._copies[name] = self._allocate(tensor)
        if is_new or changes:
            copy.copy_(tensor)
        return copy

    def _allocate(self, tensor: Tensor) -> Tensor:
        num_bytes = tensor.numel() * tensor.element_size()
        used = math.ceil(num_bytes / ALIGNMENT) * ALIGNMENT
        if used > len(self._free):
            size, pins = max(used, self._block_bytes), torch.cuda.is_available()
            self._free = torch.empty(size, dtype=torch.uint8, pin_memory=pins)
        place, self._free = self._free[:num_bytes], self._free[used:]
        return place.view(tensor.dtype).view(tensor.shape)
