"""Adapters: a fresh one, one to continue from, and those that no engine can serve."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.loading import trained_shapes
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.types import ConfigError
from tests.unit.policy.test_policy import make_batch


@pytest.fixture
def trained_adapter(tiny_model, tmp_path):
    """A folder with a trained adapter, and the logprobs of the model with it."""
    config = PolicyConfig(name="", dtype="float32", lora=LoRASettings(r=4, alpha=8))
    policy = Policy(config, tiny_model, with_reference=False)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.save_trained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), policy.evaluated_output(make_batch()).logprobs


def test_a_run_that_goes_on_from_an_adapter_has_that_adapter_as_its_reference(tiny_model, trained_adapter):
    folder, expected = trained_adapter
    lora = LoRASettings(r=4, alpha=8, init_from=folder)
    policy = Policy(PolicyConfig(name="", dtype="float32", lora=lora), tiny_model, with_reference=True)
    batch = make_batch()
    fresh = Policy(PolicyConfig(name="", dtype="float32"), tiny_model, with_reference=True)
    assert (fresh.reference_logprobs(batch) - expected).abs().max() > 0.1  # the base model has other ones
    torch.testing.assert_close(policy.evaluated_output(batch).logprobs, expected)
    torch.testing.assert_close(policy.reference_logprobs(batch), expected)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            assert parameter.dtype is torch.float32
            parameter.add_(0.1)
    torch.testing.assert_close(policy.reference_logprobs(batch), expected)
    learned = policy.output(batch).logprobs
    assert (learned - expected).abs().max() > 0.1
    learned.sum().backward()  # after the swap, gradients still flow
    assert all(parameter.grad is not None for parameter in policy.trainable_parameters())


def test_an_adapter_that_does_not_match_the_settings_is_refused(tiny_model, trained_adapter, tmp_path):
    folder, _ = trained_adapter
    for lora, words in (
        (LoRASettings(r=8, alpha=8, init_from=folder), r"lora\.r is 8, but the adapter in .* has 4: set it to 4"),
        (LoRASettings(r=4, alpha=9, init_from=folder), r"lora\.alpha is 9.* has 8: set it to 8"),
        (LoRASettings(r=4, alpha=8, use_rslora=True, init_from=folder), r"lora\.use_rslora is True.* has False"),
        (LoRASettings(init_from=str(tmp_path / "nowhere")), "is not the folder of a PEFT adapter"),
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
    """An engine gets only B A: a trained bias would be lost, and a pattern of ranks would be scaled wrongly."""
    folder, _ = trained_adapter
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    lora = LoRASettings(r=4, alpha=8, init_from=folder)
    with pytest.raises(
        ConfigError, match=rf"is not a plain LoRA adapter, and vLLM serves no other kind: it has {setting}="
    ):
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


WEIGHTS = "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


def continued(folder) -> PolicyConfig:
    return PolicyConfig(name="", dtype="float32", lora=LoRASettings(r=4, alpha=8, init_from=str(folder)))


def refusal(folder, model) -> str:
    """The error for an adapter, from its headers and again when it is loaded."""
    with pytest.raises(ConfigError) as early:
        trained_shapes(continued(folder), model, with_critic=False)
    with pytest.raises(ConfigError) as late:
        Policy(continued(folder), model, with_reference=False)
    assert str(early.value) == str(late.value)
    assert str(folder) in str(early.value)
    return str(early.value)


def test_an_adapter_with_names_under_another_prefix_is_refused(tiny_model, trained_adapter):
    """PEFT would keep the base model's values without an error."""
    file = Path(trained_adapter[0], WEIGHTS)
    prefixed = {name.replace(".model.layers", ".language_model.layers"): t for name, t in load_file(file).items()}
    save_file(prefixed, file)
    said = refusal(trained_adapter[0], tiny_model)
    assert f"{FIRST} is missing (28 of 28)" in said
    assert f"{FIRST.replace('.model.layers', '.language_model.layers')} is unexpected (28 of 28)" in said


def test_an_adapter_of_a_deeper_or_a_shallower_model_is_refused(tiny_model, tmp_path):
    config = LlamaConfig.from_pretrained(tiny_model)
    for depth, words in (
        (4, "layers.2.mlp.down_proj.lora_A.weight is unexpected (8 of 16)"),
        (1, "layers.1.mlp.down_proj.lora_A.weight is missing (4 of 8)"),
    ):
        config.num_hidden_layers = depth
        config.layer_types = None
        LlamaForCausalLM(config).save_pretrained(tmp_path / f"model{depth}")
        lora = LoRASettings(r=4, alpha=8, target_modules=["q_proj", "down_proj"])
        fresh = PolicyConfig(name="", dtype="float32", lora=lora)
        Policy(fresh, tmp_path / f"model{depth}", with_reference=False).save_trained(tmp_path / f"adapter{depth}")
        assert words in refusal(tmp_path / f"adapter{depth}", tiny_model)


def test_an_adapter_that_torch_saved_is_continued_from_and_its_code_is_not_run(tiny_model, trained_adapter, tmp_path):
    folder, expected = Path(trained_adapter[0]), trained_adapter[1]
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    assert f"neither {WEIGHTS} nor adapter_model.bin" in refusal(folder, tiny_model)
    torch.save(tensors, folder / "adapter_model.bin")
    policy = Policy(continued(folder), tiny_model, with_reference=False)
    torch.testing.assert_close(policy.evaluated_output(make_batch()).logprobs, expected)
    torch.save({**tensors, FIRST: Touches(tmp_path / "touched")}, folder / "adapter_model.bin")
    assert "is broken, cut off or not a file of tensors" in refusal(folder, tiny_model)
    assert not (tmp_path / "touched").exists()


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_an_adapter_with_numbers_that_are_none_is_refused(tiny_model, trained_adapter):
    file = Path(trained_adapter[0], WEIGHTS)
    save_file({**load_file(file), FIRST: torch.full((4, 64), float("nan"))}, file)
    with pytest.raises(ConfigError, match="that are not finite"):
        Policy(continued(trained_adapter[0]), tiny_model, with_reference=False)


@settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_tensor_that_is_dropped_renamed_reshaped_or_cut_off_is_always_refused(tiny_model, trained_adapter, data):
    whole, broken = Path(trained_adapter[0]), Path(trained_adapter[0] + "-broken")
    shutil.copytree(whole, broken, dirs_exist_ok=True)
    tensors = load_file(whole / WEIGHTS)
    name = data.draw(st.sampled_from(sorted(tensors)))
    what = data.draw(st.sampled_from(["dropped", "renamed", "reshaped", "cut off", "added"]))
    if what == "cut off":
        raw = (whole / WEIGHTS).read_bytes()
        (broken / WEIGHTS).write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    else:
        tensor = tensors[name] if what == "added" else tensors.pop(name)
        if what in ("renamed", "added"):
            tensors[data.draw(st.sampled_from([f"x.{name}", name.replace("lora_", "lora_C"), name + ".default"]))] = (
                tensor.clone()
            )
        if what == "reshaped":
            shape = data.draw(
                st.sampled_from([(tensor.shape[1], tensor.shape[0]), (tensor.numel(),), (*tensor.shape, 1)])
            )
            tensors[name] = tensor.reshape(shape)
        save_file(tensors, broken / WEIGHTS)
    refusal(broken, tiny_model)
