"""Adapters: a fresh one, one to go on from, and those that no engine could serve."""

import json
from pathlib import Path

import peft
import pytest
import torch

from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.types import ConfigError
from tests.unit.policy.test_policy import make_batch


@pytest.fixture
def trained_adapter(tiny_model, tmp_path):
    """A folder with an adapter that has learned something, and what the model says with it."""
    config = PolicyConfig(name="", dtype="float32", lora=LoRASettings(r=4, alpha=8))
    policy = Policy(config, tiny_model, with_reference=False)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.save_trained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), policy.evaluated_scores(make_batch()).logprobs


def test_a_run_that_goes_on_from_an_adapter_has_that_adapter_as_its_reference(tiny_model, trained_adapter):
    folder, expected = trained_adapter
    lora = LoRASettings(r=4, alpha=8, init_from=folder)
    policy = Policy(PolicyConfig(name="", dtype="float32", lora=lora), tiny_model, with_reference=True)
    batch = make_batch()
    fresh = Policy(PolicyConfig(name="", dtype="float32"), tiny_model, with_reference=True)
    assert (fresh.reference_logprobs(batch) - expected).abs().max() > 0.1  # the base says something else
    torch.testing.assert_close(policy.evaluated_scores(batch).logprobs, expected)
    torch.testing.assert_close(policy.reference_logprobs(batch), expected)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            assert parameter.dtype is torch.float32
            parameter.add_(0.1)
    torch.testing.assert_close(policy.reference_logprobs(batch), expected)
    learned = policy.scores(batch).logprobs
    assert (learned - expected).abs().max() > 0.1
    learned.sum().backward()  # the swap left nothing behind that would stop a gradient
    assert all(parameter.grad is not None for parameter in policy.trainable_parameters())


def test_an_adapter_that_cannot_be_gone_on_from_is_refused(tiny_model, trained_adapter, tmp_path):
    folder, _ = trained_adapter
    for lora, words in (
        (LoRASettings(r=8, alpha=8, init_from=folder), r"lora\.r is 8, and that of the adapter .* is 4: set it to 4"),
        (LoRASettings(r=4, alpha=9, init_from=folder), r"lora\.alpha is 9.* is 8: set it to 8"),
        (LoRASettings(r=4, alpha=8, use_rslora=True, init_from=folder), r"lora\.use_rslora is True.* is False"),
        (LoRASettings(init_from=str(tmp_path / "nowhere")), "is no folder of a PEFT adapter"),
    ):
        with pytest.raises(ValueError, match=words):
            Policy(PolicyConfig(name="", dtype="float32", lora=lora), tiny_model, with_reference=True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bias", "all"),
        ("lora_bias", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("init_lora_weights", "pissa"),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 1], [0, 2]]),
    ],
)
def test_an_adapter_that_is_more_than_a_product_is_refused(tiny_model, trained_adapter, setting, value):
    """What an engine gets is B A alone: a trained bias would be lost on the way, a pattern of ranks scaled wrongly."""
    folder, _ = trained_adapter
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    lora = LoRASettings(r=4, alpha=8, init_from=folder)
    with pytest.raises(ConfigError, match=rf"is no plain LoRA adapter, and vLLM serves no other: it has {setting}="):
        Policy(PolicyConfig(name="", dtype="float32", lora=lora), tiny_model, with_reference=True)


def test_an_adapter_to_go_on_from_learns_with_the_dropout_of_the_settings(tiny_model, trained_adapter):
    folder, _ = trained_adapter
    for dropout in (0.0, 0.5):
        lora = LoRASettings(r=4, alpha=8, init_from=folder, dropout=dropout)
        policy = Policy(PolicyConfig(name="", dtype="float32", lora=lora), tiny_model, with_reference=True)
        assert policy.has_dropout is (dropout > 0)


def test_the_scale_of_an_adapter_is_alpha_over_r_or_over_its_root(tiny_model):
    # 8 / 4 and 8 / sqrt(4)
    for use_rslora, scale in ((False, 2.0), (True, 4.0)):
        lora = LoRASettings(r=4, alpha=8, use_rslora=use_rslora)
        policy = Policy(PolicyConfig(name="", dtype="float32", lora=lora), tiny_model, with_reference=False)
        scales = {m.scaling["default"] for m in policy.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        assert scales == {scale}
