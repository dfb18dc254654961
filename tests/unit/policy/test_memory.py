"""Errors that mean that memory ran out. `test_checkpointing.py` counts kept bytes."""

import torch

from fuchsia_pl.policy.memory import is_out_of_memory


def test_what_out_of_memory_looks_like():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert is_out_of_memory(
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12")
    )
    assert not is_out_of_memory(RuntimeError("shapes differ"))
