"""The memory plan by hand."""

from dataclasses import replace

import pytest

from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.plan import (
    GIB,
    PlannedEngine,
    PlannedRun,
    checkpoint_bytes,
    host_bytes,
    memory_plan,
    sync_bytes,
)
from fuchsia_pl.policy.plan_sizes import Activations, Weights

# 8 GiB frozen, 1 GiB of numbers trained
WEIGHTS = Weights(frozen=8 * GIB, num_trained=GIB, num_critic=0, num_served=4 * GIB, block=GIB // 4, outside=GIB)
ACTIVATIONS = Activations(kept=10 * GIB, logits=GIB, transients=2 * GIB, on_host=0)
ENGINE = PlannedEngine(
    weights=8 * GIB,
    kv_cache=4 * GIB,
    kv_per_token=2**15,
    max_length=1024,
    max_num_seqs=64,
    per_request=2**24,
    buffers=GIB,
    graphs=GIB,
)
RUN = PlannedRun(PolicyConfig(""), ENGINE, longest_row=1000, group_size=8, num_rows=64)


def sizes(run: PlannedRun = RUN, available: int = 80 * GIB, activations: Activations = ACTIVATIONS) -> dict[str, float]:
    plan = memory_plan(run, WEIGHTS, activations, available)
    return {f"{part.side}: {part.name}": part.num_bytes / GIB for part in plan.parts}


def test_both_sides_by_hand():
    assert sizes() == {
        "trainer: frozen weights": 8.0,
        "trainer: LoRA, gradients, optimizer": 16.0,  # float32: weights, gradients, two moments
        "trainer: kept activations": 10.0,
        "trainer: logits of a chunk": 1.0,
        "trainer: transients": 2.0,
        "trainer: CUDA context": 0.5,
        "engine: weights": 8.0,
        "engine: KV cache": 4.0,
        "engine: activations and buffers": 2.0,  # 1 GiB, and 64 requests of 16 MiB
        "engine: CUDA graphs": 1.0,
        "engine: CUDA context": 0.5,
    }
    assert memory_plan(RUN, WEIGHTS, ACTIVATIONS, 53 * GIB).fits  # 37.5 + 15.5
    assert not memory_plan(RUN, WEIGHTS, ACTIVATIONS, 53 * GIB - 1).fits


def test_a_teachers_adapter_is_one_more_part_that_each_rank_has_whole():
    for run in (RUN, replace(RUN, num_ranks=4, is_sharded=True)):
        with_teacher = sizes(replace(run, teacher_bytes=GIB // 2))
        assert with_teacher == {**sizes(run), "trainer: adapter of the teacher": 0.5}


def test_several_ranks_by_hand():
    sharded = sizes(replace(RUN, num_ranks=8, is_sharded=True))
    assert sharded["trainer: frozen weights"] == 1.0
    assert sharded["trainer: LoRA, gradients, optimizer"] == 3 * 4 / 8 + 4  # gradients of an adapter stay whole
    assert sharded["trainer: weights gathered by FSDP"] == 1.5  # two blocks of a quarter, and what is outside of blocks
    assert sharded["engine: weights"] == 8.0
    copies = sizes(replace(RUN, num_ranks=8))
    assert copies["trainer: gradient buckets of DDP"] == 4.0
    assert copies["trainer: frozen weights"] == 8.0
    whole = replace(RUN, policy=PolicyConfig("", lora=LoRASettings(enabled=False)), num_ranks=8, is_sharded=True)
    assert sizes(whole)["trainer: weights, gradients, optimizer"] == 2.0
    assert sizes(whole)["trainer: frozen weights"] == 8.0  # the reference, which FSDP leaves whole


@pytest.mark.parametrize(
    ("ranks", "staying"),
    [
        ({}, {"CUDA context"}),
        ({"num_ranks": 2}, {"CUDA context", "LoRA, gradients, optimizer", "gradient buckets of DDP"}),
        ({"num_ranks": 2, "is_sharded": True}, {"CUDA context", "frozen weights", "LoRA, gradients, optimizer"}),
    ],
)
def test_what_hotswap_leaves_on_the_device_stays_beside_the_engine(ranks, staying):
    plan = memory_plan(replace(RUN, shares_device=True, **ranks), WEIGHTS, ACTIVATIONS, 80 * GIB)
    assert {part.name for part in plan.parts if part.stays and part.side == "trainer"} == staying


def test_an_update_of_the_optimizer_may_need_more_than_the_backward():
    little = Activations(kept=GIB, logits=GIB // 2)
    assert sizes(activations=little)["trainer: update of the optimizer"] == 2.5  # a copy of 4 GiB, with 1.5 freed
    assert "trainer: update of the optimizer" not in sizes(replace(RUN, is_gpu=False), activations=little)
    assert sizes(replace(RUN, num_moments=0))["trainer: LoRA, gradients, optimizer"] == 8.0


def test_a_shared_device_by_hand():
    # one side at a time: 37 and 14 GiB; two contexts and the graphs stay
    plan = memory_plan(replace(RUN, shares_device=True), WEIGHTS, ACTIVATIONS, 80 * GIB)
    assert plan.total == (37 + 2) * GIB
    assert "peak (one side at a time) 39.0 of 80.0 GiB" in plan.text


def test_a_cache_that_takes_what_is_free():
    run = replace(RUN, engine=replace(ENGINE, kv_cache=None))
    assert sizes(run)["engine: KV cache"] == 80 - 37.5 - 11.5
    assert memory_plan(run, WEIGHTS, ACTIVATIONS, 80 * GIB).fits
    # beside a trainer that leaves too little, it still holds a group of the longest rows: 8 of 1024 tokens of 32 KiB
    tight = memory_plan(run, WEIGHTS, ACTIVATIONS, 40 * GIB)
    assert tight.size("engine", "KV cache") == 8 * 1024 * 2**15
    assert not tight.fits
    shared = memory_plan(replace(run, shares_device=True), WEIGHTS, ACTIVATIONS, 60 * GIB)
    assert shared.size("engine", "KV cache") == (60 - 2 - 10) * GIB
    assert shared.total == 60 * GIB


def test_an_engine_elsewhere_and_a_cpu_have_no_contexts():
    alone = sizes(replace(RUN, engine=None))
    assert not any(name.startswith("engine") for name in alone)
    on_cpu = sizes(replace(RUN, is_gpu=False, engine=replace(ENGINE, graphs=0)))
    assert not any("CUDA" in name for name in on_cpu)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        # two processes of 2 GiB, and the model while it loads: 4 Gi numbers in bfloat16
        (RUN, 4 + 8),
        (replace(RUN, num_ranks=4), 16 + 32),
        (replace(RUN, num_ranks=4, is_sharded=True), 16 + 8),
        (replace(RUN, engine=None), 2 + 8),
        # the side that is not on the device: 8 + 16 GiB of the trainer, 8 of the engine
        (replace(RUN, shares_device=True), 4 + 32),
    ],
)
def test_host_memory_by_hand(run, expected):
    assert host_bytes(run, WEIGHTS, ACTIVATIONS) == expected * GIB


def test_files_by_hand():
    offloaded = replace(ACTIVATIONS, on_host=30 * GIB)
    assert host_bytes(RUN, WEIGHTS, offloaded) == (4 + 30) * GIB
    assert checkpoint_bytes(RUN, WEIGHTS) == 12 * GIB
    assert sync_bytes(RUN, WEIGHTS) == 4 * GIB  # an adapter in float32
    whole = replace(RUN, policy=PolicyConfig("", lora=LoRASettings(enabled=False)))
    assert sync_bytes(whole, replace(WEIGHTS, num_critic=GIB // 2)) == GIB  # in bfloat16, without the critic
