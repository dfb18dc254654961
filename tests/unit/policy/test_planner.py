"""Settings that make a run fit, and those that save most."""

from dataclasses import replace

import pytest

from fuchsia_pl.batch import PrefixGroup
from fuchsia_pl.policy.config import CheckpointingSettings, LoRASettings, PolicyConfig
from fuchsia_pl.policy.plan import GIB, PlannedEngine, PlannedRun
from fuchsia_pl.policy.plan_sizes import Activations, MicroBatch, Weights
from fuchsia_pl.policy.planner import CHANGES, Planner
from fuchsia_pl.types import ConfigError

ENGINE = PlannedEngine(8 * GIB, 4 * GIB, 2**15, 1024, max_num_seqs=64, per_request=2**24, buffers=GIB, graphs=GIB)
RUN = PlannedRun(PolicyConfig(""), ENGINE, longest_row=1000, group_size=8, num_rows=64, num_micro_batches=4)


class Scripted:
    """A model whose activations are proportional to the tokens, a fifth of them with checkpointing."""

    def run(self, policy, micro_batch):
        kept = micro_batch.num_tokens * 2**20 // (5 if policy.checkpointing.enabled else 1)
        frozen = 8 * GIB if policy.quantization is None else 2 * GIB
        weights = Weights(frozen, policy.lora.r * 2**21, 0, 4 * GIB, GIB // 4, GIB)
        if policy.checkpointing.cpu_offloading:
            return weights, Activations(0, GIB, GIB, on_host=kept)
        return weights, Activations(kept, GIB, GIB)


def largest(run: PlannedRun) -> MicroBatch:
    tokens = run.policy.max_tokens_per_micro_batch or 16384 // run.num_micro_batches
    return MicroBatch((tokens,), (PrefixGroup(1, tokens),), tokens, True)


def planner(available: float) -> Planner:
    return Planner(Scripted(), largest, int(available * GIB))


def test_the_cheapest_sets_come_first_and_contain_no_cheaper_one():
    # 8 + 0.5 + 4 + 1 + 1 + 0.5 = 15 on the trainer's side, 8 + 4 + 2 + 1 + 0.5 = 15.5 on the engine's
    assert planner(30.5).plan(RUN).fits
    assert not planner(30.4).plan(RUN).fits
    # half a GiB less: half of the activations saves 2, half of the cache 2, half of the requests 0.5
    assert planner(30.0).options(RUN) == [
        "--trainer.accumulate_grad_batches 8",
        "--data.engine.init_args.kv_cache_gb 2",
        "--data.engine.init_args.max_num_seqs 32",
    ]
    # 3.5 less: a quarter of the activations saves 3, so it takes one more setting
    assert planner(27.0).options(RUN)[0] == "--trainer.accumulate_grad_batches 8 --data.engine.init_args.kv_cache_gb 2"


@pytest.mark.parametrize("available", [28.0, 26.0, 24.0, 22.0, 20.0])
def test_with_each_set_of_options_the_run_fits(available):
    """The options are read back and applied by hand."""
    found = planner(available).options(RUN)
    assert found
    for option in found:
        words = option.split()
        given = dict(zip(words[::2], words[1::2], strict=True))
        run, engine, policy = RUN, ENGINE, RUN.policy
        for name, value in given.items():
            match name:
                case "--trainer.accumulate_grad_batches":
                    run = replace(run, num_micro_batches=int(value))
                case "--data.engine.init_args.kv_cache_gb":
                    engine = replace(engine, kv_cache=int(float(value) * GIB))
                case "--data.engine.init_args.max_num_seqs":
                    engine = replace(engine, max_num_seqs=int(value))
                case "--data.engine.init_args.enforce_eager":
                    engine = replace(engine, graphs=0)
                case "--model.policy.checkpointing.enabled":
                    policy = replace(policy, checkpointing=CheckpointingSettings(enabled=True))
                case "--hotswap.enabled":
                    run = replace(run, shares_device=True)
                case "--model.policy.quantization":
                    policy = replace(policy, quantization="nf4")
                case "--model.policy.lora.r":
                    policy = replace(policy, lora=LoRASettings(r=int(value)))
                case _:
                    raise AssertionError(name)
        assert planner(available).plan(replace(run, engine=engine, policy=policy)).fits


def test_where_nothing_helps_there_are_no_options():
    assert planner(4.0).options(RUN) == []


def test_settings_are_offered_only_where_they_apply():
    def offered(run: PlannedRun) -> set[str]:
        return {changed[0].split()[0] for change in CHANGES if (changed := change.apply(run)) is not None}

    assert {"--hotswap.enabled", "--model.policy.quantization", "--data.engine.init_args.enforce_eager"} <= offered(RUN)
    budget = replace(RUN, policy=PolicyConfig("", max_tokens_per_micro_batch=3000))
    assert "--model.policy.max_tokens_per_micro_batch" in offered(budget)  # 1500 holds the longest row, 750 does not
    assert "--trainer.accumulate_grad_batches" not in offered(budget)
    on_cpu = offered(replace(RUN, is_gpu=False, engine=replace(ENGINE, graphs=0)))
    assert not on_cpu & {"--hotswap.enabled", "--model.policy.quantization", "--data.engine.init_args.enforce_eager"}
    elsewhere = offered(replace(RUN, engine=None))
    assert not {name for name in elsewhere if "engine" in name or "hotswap" in name}
    assert "--hotswap.enabled" not in offered(replace(RUN, can_share_device=False))
    assert "--data.engine.init_args.kv_cache_gb" not in offered(replace(RUN, engine=replace(ENGINE, kv_cache=None)))
    ranks = replace(RUN, num_ranks=2)
    assert "--config" in offered(ranks) - offered(RUN)
    sharded = offered(replace(ranks, is_sharded=True))
    assert not sharded & {"--config", "--model.policy.quantization"}  # FSDP2 does not take 4 bits
    whole = replace(RUN, policy=PolicyConfig("", lora=LoRASettings(enabled=False)))
    assert not {name for name in offered(whole) if "lora" in name or "quantization" in name}
    checkpointed = replace(RUN, policy=PolicyConfig("", checkpointing=CheckpointingSettings(enabled=True)))
    assert "--model.policy.checkpointing.cpu_offloading" in offered(checkpointed)
    assert "--model.policy.checkpointing.enabled" not in offered(checkpointed)


def test_what_saves_most_by_hand():
    # one side at a time saves the smaller of 14.5 and 14; nf4 saves 6; checkpointing 3.2, as much as 4 GiB of activations allow
    assert [(name, round(size / GIB, 1)) for name, size in planner(30.0).savings(RUN)] == [
        ("--hotswap.enabled true", 14.0),
        ("--model.policy.quantization nf4", 6.0),
        ("--model.policy.checkpointing.enabled true", 3.2),
    ]


def test_a_change_that_cannot_be_simulated_is_no_option():
    class Unknown(Scripted):
        def run(self, policy, micro_batch):
            if policy.checkpointing.enabled:
                raise ConfigError("it does not support checkpointing")
            return super().run(policy, micro_batch)

    found = Planner(Unknown(), largest, int(16.5 * GIB)).options(RUN)
    assert found
    assert not any("checkpointing" in option for option in found)
