"""The base model: required contents of its files, and its trained weights, from headers alone."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.loading import load_base, trained_shapes
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.types import ConfigError

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("device", ["meta", None])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(UP), f"lack 1 of the model's weights, the first is {UP}"),
        (
            lambda t: t.update({"model.layers.7.x": t[UP].clone()}),
            "hold 1 tensors that the model does not have, the first is",
        ),
        (
            lambda t: t.update({UP: torch.zeros(3, 3)}),
            f"1 tensors of its files have another shape than in the model, the first is {UP}",
        ),
    ],
    ids=["dropped", "added", "reshaped"],
)
def test_a_model_whose_files_are_not_its_weights_is_refused(tiny_model, tmp_path, change, words, device):
    """transformers only warns, and initialises such a weight at random."""
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError) as caught:
        load_base(tmp_path / "model", torch.float32, device=device)
    assert words in str(caught.value)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_model_file_that_is_cut_off_is_refused(tiny_model, tmp_path, length):
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*Download or save it again"):
        load_base(tmp_path / "model", torch.float32, device="meta")


@pytest.mark.parametrize("has_critic", [False, True])
@pytest.mark.parametrize(
    "lora", [LoRASettings(r=4, alpha=8), LoRASettings(r=2, target_modules=["q_proj"]), LoRASettings(enabled=False)]
)
def test_what_would_be_trained_is_known_without_loading_it(tiny_model: Path, lora, has_critic):
    config = PolicyConfig(name="", dtype="float32", lora=lora)
    policy = Policy(config, tiny_model, with_reference=False, with_critic=has_critic)
    expected = {name: tuple(p.shape) for name, p in policy.named_parameters() if p.requires_grad}
    assert trained_shapes(config, tiny_model, has_critic) == expected


def test_scores_of_attention_are_capped_where_the_model_caps_them(tmp_path):
    """vLLM caps them; the default attention of transformers does not, without a word."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5, "pad_token_id": 0}
    logits = {}
    for cap in (2.0, None):
        config = Gemma2Config(**sizes, **heads, attn_logit_softcapping=cap)
        torch.manual_seed(0)
        Gemma2ForCausalLM(config).save_pretrained(tmp_path / str(cap))
        model = load_base(tmp_path / str(cap), torch.float32).eval()
        exact = Gemma2ForCausalLM.from_pretrained(tmp_path / str(cap), attn_implementation="eager").eval()
        ids = torch.arange(3, 23).unsqueeze(0)
        logits[cap] = model(ids).logits
        torch.testing.assert_close(logits[cap], exact(ids).logits, rtol=1e-4, atol=1e-4)
    assert (logits[2.0] - logits[None]).abs().max() > 0.01
    assert not Policy(PolicyConfig("", "float32"), tmp_path / "2.0", with_reference=False).shares_prefix
