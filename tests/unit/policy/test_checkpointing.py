"""Tensors that autograd saves for backward, and their device. `test_shared_prefix.py` tests that gradients are the same."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fuchsia_pl.batch import StepInfo
from fuchsia_pl.policy import checkpointing
from fuchsia_pl.policy.config import CheckpointingSettings, LoRASettings, PolicyConfig
from fuchsia_pl.policy.memory import KeptBytes
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.rollouts.batcher import make_batches, split_balanced
from fuchsia_pl.types import ConfigError
from tests.doubles import denominators, make_sample


def deep_policy(folder, **settings) -> Policy:
    config = PolicyConfig("", "float32", LoRASettings(r=4, alpha=8), checkpointing=CheckpointingSettings(**settings))
    return Policy(config, folder, with_reference=False).train()


def make_batch():
    samples = [make_sample([5, 6, 7], [8 + row, *range(9, 30), 2], 1.0) for row in range(4)]
    return make_batches(split_balanced(samples, 1, True), StepInfo(0, denominators(1), 0))[0]


def kept_bytes(policy: Policy) -> int:
    kept = KeptBytes(policy)
    with kept:
        policy.output(make_batch())
    return kept.num_bytes


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """Thirty layers, as many as SmolLM2-135M has."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("deep")
    config = LlamaConfig(
        vocab_size=44,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=30,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_checkpointing_keeps_less_than_a_third_at_depth_thirty_and_every_other_layer_lies_between(deep_model):
    whole = kept_bytes(deep_policy(deep_model))
    half = kept_bytes(deep_policy(deep_model, enabled=True, every_n_layers=2))
    least = kept_bytes(deep_policy(deep_model, enabled=True))
    assert least < 0.3 * whole
    assert 0.4 * whole < half < 0.7 * whole


def test_offloading_moves_what_is_kept_of_checkpointed_blocks(deep_model, monkeypatch):
    """On a CPU, host and device share memory, so copies are counted; the gpu tests count devices."""
    moved: list[torch.Size] = []
    original = checkpointing.torch.autograd.graph.save_on_cpu

    class Counting(original):
        def __init__(self, **settings) -> None:
            super().__init__(**settings)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: moved.append(tensor.shape) or pack(tensor)

    monkeypatch.setattr(checkpointing.torch.autograd.graph, "save_on_cpu", Counting)
    expected = deep_policy(deep_model, enabled=True)
    policy = deep_policy(deep_model, enabled=True, cpu_offloading=True)
    policy.load_state_dict(expected.state_dict())
    gradients = []
    for each in (expected, policy):
        each.output(make_batch()).logprobs.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.trainable_parameters()]))
    assert torch.equal(*gradients)
    num_tokens = 3 + 4 * 22  # the prompt once, and the completions without their last tokens
    assert moved.count(torch.Size([1, num_tokens, 32])) >= 30  # at least the input of each block


def test_settings_that_would_do_nothing_are_refused():
    for settings, words in (
        ({"cpu_offloading": True}, "cpu_offloading does nothing without checkpointing"),
        ({"every_n_layers": 2}, "every_n_layers does nothing without checkpointing"),
        ({"enabled": True, "every_n_layers": 2, "cpu_offloading": True}, "weights of blocks that are not checkpointed"),
        ({"enabled": True, "every_n_layers": 0}, "must be 1 or more, got 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            CheckpointingSettings(**settings)


def test_a_model_that_cannot_be_checkpointed_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not support it: set enabled: false"):
        deep_policy(tiny_model, enabled=True)


def test_four_bit_weights_are_refused_where_they_cannot_work(tiny_model, monkeypatch):
    with pytest.raises(ConfigError, match=r"needs an adapter.*lora\.enabled: true"):
        PolicyConfig("", lora=LoRASettings(enabled=False), quantization="nf4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match='quantization="nf4" needs a CUDA device, and torch finds none'):
        Policy(PolicyConfig("", quantization="nf4"), tiny_model, with_reference=False)
