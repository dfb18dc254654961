"""Layers with an adapter: only names that exist are accepted."""

import pytest

from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.model_folder import blank_model
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.policy.targets import check_targets
from fuchsia_pl.types import ConfigError

LINEAR = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


@pytest.fixture(scope="module")
def blank(tiny_model):
    return blank_model(tiny_model)


def test_a_string_that_is_a_name_is_that_module(tiny_model):
    def adapted(targets) -> set[str]:
        policy = Policy(PolicyConfig("", "float32", LoRASettings(target_modules=targets)), tiny_model, False)
        return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in policy.named_parameters() if p.requires_grad}

    assert adapted("q_proj") == adapted(["q_proj"]) == {"q_proj"}
    assert adapted("self_attn.q_proj") == {"q_proj"}
    assert adapted(r".*\.(k|v)_proj") == {"k_proj", "v_proj"}


@pytest.mark.parametrize("targets", ["all-linear", "q_proj", ["q_proj", "layers.0.mlp.up_proj"], r".*\.[kv]_proj"])
def test_names_that_exist_are_taken(blank, targets):
    check_targets(blank, LoRASettings(target_modules=targets))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("no_proj", "'no_proj' matches no layer of the model"),
        (["q_proj", "no_proj"], "'no_proj' matches no layer of the model"),
        (["q_proj", "q_pro"], "'q_pro' matches no layer of the model"),
        (r"layers\.\d+\.q_proj", r"q_proj' matches no layer of the model"),
        (["q_proj", "input_layernorm"], "'input_layernorm' matches LlamaRMSNorm, which is not a linear layer"),
        ("self_attn", "'self_attn' matches LlamaAttention, which is not a linear layer"),
    ],
)
def test_a_name_that_is_no_linear_layer_is_refused_even_beside_one_that_is(blank, tiny_model, targets, words):
    settings = LoRASettings(target_modules=targets)
    with pytest.raises(ConfigError, match=f"{words}. The linear layers of LlamaForCausalLM are {LINEAR}; or use"):
        check_targets(blank, settings)
    with pytest.raises(ConfigError, match=words):
        Policy(PolicyConfig("", "float32", settings), tiny_model, with_reference=False)


def test_an_adapter_to_go_on_from_and_all_weights_have_no_targets(blank):
    check_targets(blank, LoRASettings(target_modules=["nothing"], init_from="folder"))
    check_targets(blank, LoRASettings(target_modules=["nothing"], enabled=False))


@pytest.mark.parametrize(
    ("targets", "words"),
    [("(q_proj", "is neither a layer's name nor a regular expression"), ([], "target_modules is empty")],
)
def test_what_can_name_nothing_is_refused_without_a_model(targets, words):
    with pytest.raises(ConfigError, match=words):
        LoRASettings(target_modules=targets)
