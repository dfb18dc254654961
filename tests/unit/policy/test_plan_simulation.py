"""The simulated bytes against those that a real forward keeps, for four architectures."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fuchsia_pl.batch import PrefixGroup, StepInfo
from fuchsia_pl.policy.config import CheckpointingSettings, LoRASettings, PolicyConfig
from fuchsia_pl.policy.memory import KeptBytes
from fuchsia_pl.policy.plan_simulation import PeakBytes, Simulator
from fuchsia_pl.policy.plan_sizes import MicroBatch, weights_of
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.rollouts.batcher import make_batches, split_balanced
from fuchsia_pl.types import ConfigError
from tests.doubles import denominators, make_sample

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.for_model(request.param, **{**SIZES, **ARCHITECTURES[request.param]})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def settings(is_checkpointed: bool, is_packed: bool, **others) -> PolicyConfig:
    return PolicyConfig(
        "",
        **{"dtype": "float32", "lora": LoRASettings(r=4, alpha=8), **others},
        shared_prefix="always" if is_packed else "never",
        checkpointing=CheckpointingSettings(enabled=is_checkpointed),
    )


def make_batch(prompt: int, *owns: int):
    samples = [
        make_sample([5 + at % 30 for at in range(prompt)], [6 + n % 7, *[7] * (own - 1)], 1.0)
        for n, own in enumerate(owns)
    ]
    return make_batches(split_balanced(samples, 1, True), StepInfo(0, denominators(1), 0))[0]


def simulated(folder, config: PolicyConfig, batch, autocast=None):
    simulator = Simulator(AutoConfig.from_pretrained(folder), autocast, is_gpu=False)
    return simulator.run(config, MicroBatch.of(batch, config.shared_prefix != "never"))


def measured(folder, config: PolicyConfig, batch, autocast=None) -> tuple[Policy, int]:
    policy = Policy(config, folder, with_reference=False).train()
    kept = KeptBytes(policy)
    with kept, torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        policy.output(batch)
    return policy, kept.num_bytes


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("is_checkpointed", [True, False], ids=["checkpointed", "kept"])
def test_kept_bytes_are_those_of_a_real_forward(folder, is_checkpointed, is_packed):
    config, batch = settings(is_checkpointed, is_packed), make_batch(90, 70, 50, 61, 70)
    policy, kept = measured(folder, config, batch)
    assert policy.shares_prefix is is_packed
    weights, activations = simulated(folder, config, batch)
    assert activations.kept == pytest.approx(kept, rel=0.1)
    assert weights == weights_of(policy)


def test_short_rows_and_autocast_are_simulated_as_they_run(tiny_model):
    for config, batch, autocast in (
        (settings(False, True), make_batch(20, 9, 12, 12), None),
        (settings(False, True, dtype="bfloat16"), make_batch(90, 70, 50), torch.bfloat16),
        (settings(True, False, lora=LoRASettings(enabled=False)), make_batch(30, 20, 10), torch.bfloat16),
    ):
        policy, kept = measured(tiny_model, config, batch, autocast)
        weights, activations = simulated(tiny_model, config, batch, autocast)
        assert activations.kept == pytest.approx(kept, rel=0.1)
        assert weights == weights_of(policy)


def test_the_peak_of_a_real_backward(tiny_model):
    """The same counter on real tensors."""
    config, batch = settings(True, True), make_batch(90, 70, 50, 61, 70)
    policy, _ = measured(tiny_model, config, batch)
    for parameter in policy.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    peak = PeakBytes()
    peak.ignore([*policy.parameters(), *policy.buffers(), *(p.grad for p in policy.trainable_parameters())])
    with peak:
        policy.output(batch).logprobs.sum().backward()
    _, found = simulated(tiny_model, config, batch)
    assert found.kept + found.logits + found.transients == pytest.approx(peak.peak, rel=0.1)
    assert found.transients > 0


@pytest.mark.parametrize(
    "checkpointing", [{"enabled": False}, {"enabled": True, "every_n_layers": 2}], ids=["kept", "half"]
)
def test_a_deep_model_is_extended_from_two_depths(tmp_path, monkeypatch, checkpointing):
    kinds = ["sliding_attention", "full_attention", "full_attention"] * 4
    sizes = {**SIZES, "num_hidden_layers": 13, "sliding_window": 64, "layer_types": [*kinds, kinds[0]]}
    architecture = AutoConfig.for_model("gemma3_text", **sizes)
    config = settings(False, True)
    config.checkpointing = CheckpointingSettings(**checkpointing)
    micro_batch, depths = MicroBatch((159, 139), (PrefixGroup(2, 90),), 120, True), []
    simulated = Simulator._simulated
    monkeypatch.setattr(
        Simulator, "_simulated", lambda self, depth, *rest: depths.append(depth) or simulated(self, depth, *rest)
    )
    _, extended = Simulator(architecture, is_gpu=False).run(config, micro_batch)
    period = 6 if checkpointing["enabled"] else 3
    assert depths == ([7, 13] if checkpointing["enabled"] else [4, 7])
    assert 13 % period == 1
    whole = simulated(Simulator(architecture, is_gpu=False), 13, config, micro_batch)
    assert extended.kept == pytest.approx(whole.kept, rel=0.01)
    assert extended.kept + extended.transients == pytest.approx(whole.kept + whole.transients, rel=0.02)


def test_peak_by_hand():
    kept = torch.zeros(3)
    peak = PeakBytes()
    peak.ignore([kept])
    with peak:
        first = torch.zeros(100)  # 400 bytes
        first.view(10, 10).add_(1)  # no new storage
        second = first + 1  # 800
        del first
        third = second[:10] * 2  # 440
        kept.add_(1)
    assert (peak.peak, peak.num_bytes) == (800, 440)
    assert third.shape == (10,)


def test_offloading_checkpointing_and_the_critic_change_what_is_kept(tiny_model):
    batch = make_batch(90, 70, 50)
    _, plain = simulated(tiny_model, settings(False, True), batch)
    config = settings(True, True)
    _, checkpointed = simulated(tiny_model, config, batch)
    config.checkpointing.cpu_offloading = True
    _, offloaded = simulated(tiny_model, config, batch)
    assert (offloaded.kept, offloaded.on_host) == (0, checkpointed.kept)
    assert checkpointed.kept < plain.kept
    architecture = AutoConfig.from_pretrained(tiny_model)
    critic = Simulator(architecture, with_critic=True, is_gpu=False)
    weights, with_critic = critic.run(settings(False, True), MicroBatch.of(batch, True))
    assert with_critic.kept - plain.kept == 4 * (70 + 50) * (
        32 + 2 * 256
    )  # the hidden states in float32, and the inner layer
    assert weights.num_critic == 32 * 256 + 256 + 256 + 1


def test_four_bits_and_a_reference_that_is_a_copy(tiny_model):
    architecture, micro_batch = (
        AutoConfig.from_pretrained(tiny_model),
        MicroBatch((20,), (PrefixGroup(1, 20),), 10, True),
    )
    simulator = Simulator(architecture, with_reference=True, is_gpu=False)
    dense, _ = simulator.run(settings(False, True, dtype="bfloat16"), micro_batch)
    packed, _ = simulator.run(settings(False, True, dtype="bfloat16", quantization="nf4"), micro_batch)
    linear = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64)  # two layers: q and o, k and v, the MLP
    assert dense.frozen - packed.frozen == pytest.approx(linear * (2 - 4.127 / 8), abs=20)
    whole, _ = simulator.run(settings(False, True, dtype="bfloat16", lora=LoRASettings(enabled=False)), micro_batch)
    assert whole.frozen == 2 * whole.num_trained == 2 * dense.num_served


def test_a_model_that_needs_values_is_one_line(tiny_model, monkeypatch):
    def needs_values(*arguments, **settings):
        return bool(torch.ones(1).sum() > 0)

    monkeypatch.setattr("fuchsia_pl.policy.plan_simulation.chunked_logprobs", needs_values)
    with pytest.raises(ConfigError, match="a model of type 'llama' cannot be planned") as caught:
        simulated(tiny_model, settings(False, True), make_batch(9, 9))
    assert "\n" not in str(caught.value)
