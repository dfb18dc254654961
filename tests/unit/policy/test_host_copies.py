"""Host copies: bytes that are moved in each direction, and memory in blocks. The meta device takes the place of a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fuchsia_pl.policy.host_copies import ALIGNMENT, HostCopies

HOST, META = torch.device("cpu"), torch.device("meta")


class Transfers(TorchDispatchMode):
    """Counts the bytes that cross between the devices. A download leaves the host's values, since the meta device has none."""

    def __init__(self) -> None:
        super().__init__()
        self.up = self.down = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and args[1].device == META:
            self.down += args[1].nbytes
            return args[0]
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == META:
            self.up += args[0].nbytes
        return func(*args, **kwargs)


def test_what_does_not_change_is_downloaded_never_or_once_and_the_rest_at_each_turn():
    frozen, trained = torch.arange(10.0), torch.ones(3)
    for starts_on_device, num_frozen_downloads in ((False, 0), (True, 1)):
        copies = HostCopies(block_bytes=1024)
        here = {"frozen": frozen, "trained": trained}
        if starts_on_device:
            here = {name: tensor.to(META) for name, tensor in here.items()}
        counts = Transfers()
        with counts:
            for _ in range(4):
                for device in (META, HOST):
                    here = {
                        name: copies.moved(name, tensor, device, changes=name == "trained")
                        for name, tensor in here.items()
                    }
        assert {tensor.device for tensor in here.values()} == {HOST}
        num_uploads = 3 if starts_on_device else 4
        assert counts.up == num_uploads * (40 + 12)
        assert counts.down == num_frozen_downloads * 40 + 4 * 12
        assert starts_on_device or torch.equal(here["frozen"], frozen)


def test_a_tensor_that_is_there_is_returned_as_it_is():
    tensor, copies = torch.ones(3), HostCopies()
    assert copies.moved("tensor", tensor, HOST, changes=True) is tensor
    assert not copies._copies


def test_copies_in_a_block_do_not_overlap_and_a_large_tensor_gets_its_own():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "bytes": torch.randint(0, 255, (37,), dtype=torch.uint8, generator=generator),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(5, 7, generator=generator).bfloat16(),
        "large": torch.randn(40, 40, generator=generator),
        "double": torch.randn(3, generator=generator).double(),
    }
    copies = HostCopies(block_bytes=4 * ALIGNMENT)
    kept = {name: copies._copy(name, tensor, changes=False) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(kept[name], tensor)
        assert (kept[name].dtype, kept[name].shape) == (tensor.dtype, tensor.shape)
        assert kept[name].data_ptr() != tensor.data_ptr() or not tensor.numel()
    blocks = {kept[name].untyped_storage().data_ptr() for name in ("bytes", "scalar", "half")}
    assert len(blocks) == 1
    assert kept["large"].untyped_storage().nbytes() == 25 * ALIGNMENT  # 6400 bytes
    assert all(tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0 for tensor in kept.values())


def test_a_tensor_of_another_shape_gets_a_new_copy():
    copies = HostCopies(block_bytes=1024)
    first = copies._copy("state", torch.ones(2), changes=True)
    assert copies._copy("state", torch.zeros(2), changes=True) is first
    second = copies._copy("state", torch.ones(3), changes=True)
    assert (first.tolist(), second.tolist()) == ([0, 0], [1, 1, 1])


@pytest.mark.parametrize("target", [HOST, META])
def test_what_is_moved_in_a_validation_can_be_trained_later(target):
    """Lightning validates in inference mode, whose tensors autograd refuses."""
    other = torch.device("cpu", 0) if target == HOST else META
    with torch.inference_mode():
        moved = HostCopies(block_bytes=1024).moved("weight", torch.ones(2), other, changes=False)
    assert not moved.is_inference()
