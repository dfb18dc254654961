"""The memory plan by hand, and the settings that it names."""

from dataclasses import replace

import torch

from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.config import CheckpointingSettings
from fuchsia_pl.policy.memory import SAVED_BY, MemoryPlan, is_out_of_memory, memory_plan, possible_savings
from tests.doubles import TinyEngine, make_module

GB = 2**30
SHARE_DEVICE = "--hotswap.enabled true"
PLAN = MemoryPlan(8 * GB, GB, 20 * GB, 8 * GB, 4 * GB, 32 * GB)


def test_a_reference_that_is_a_copy_is_counted(tiny_model):
    """All weights are trained, so no weight of the policy itself is frozen."""
    for beta, copies in ((0.0, 0), (0.1, 1)):
        module = make_module(tiny_model, LossConfig(beta=beta), enabled=False)
        module.configure_model()
        plan = memory_plan(module.policy, TinyEngine(), 0, torch.device("cpu"))
        assert plan.base_weights == copies * 4 * sum(p.numel() for p in module.policy.parameters())


def test_savings_by_hand():
    # of 20 GB of activations checkpointing saves 16 and twice the micro-batches 10; of 8 GB in 4 bits 5.6; of 4 GB of cache 2
    everything = set(SAVED_BY) - {"--model.policy.checkpointing.cpu_offloading true", SHARE_DEVICE}
    assert [(name.split()[0], round(size / GB, 1)) for name, size in PLAN.savings(everything)] == [
        ("--model.policy.checkpointing.enabled", 16.0),
        ("--trainer.accumulate_grad_batches", 10.0),
        ("--model.policy.quantization", 5.6),
    ]
    assert PLAN.total == 41 * GB
    assert replace(PLAN, kv_cache=0).savings({"--data.engine.init_args.kv_cache_gb half"}) == []


def test_a_shared_device_by_hand():
    # the trainer's 29 GB and the engine's 12 are never on the device together; a smaller cache would not help the trainer
    assert PLAN.savings({SHARE_DEVICE}) == [(SHARE_DEVICE, 12 * GB)]
    sharing = replace(PLAN, shares_device=True)
    assert sharing.total == 29 * GB
    assert sharing.savings({"--data.engine.init_args.kv_cache_gb half"}) == []


def test_only_what_is_left_to_save_is_named(tiny_model):
    module = make_module(tiny_model)
    module.configure_model()
    names = possible_savings(module.policy, torch.device("cpu"), can_share_device=True)
    assert "--model.policy.checkpointing.enabled true" in names
    assert SHARE_DEVICE not in names
    assert not {name for name in names if "nf4" in name or "cpu_offloading" in name}
    module.policy.config.checkpointing = CheckpointingSettings(enabled=True)
    assert SHARE_DEVICE not in possible_savings(module.policy, torch.device("cuda"), can_share_device=False)
    names = possible_savings(module.policy, torch.device("cuda"), can_share_device=True)
    assert SHARE_DEVICE in names
    assert "--model.policy.checkpointing.enabled true" not in names
    assert len({name for name in names if "nf4" in name or "cpu_offloading" in name}) == 2


def test_what_out_of_memory_looks_like():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert is_out_of_memory(
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12")
    )
    assert not is_out_of_memory(RuntimeError("shapes differ"))
