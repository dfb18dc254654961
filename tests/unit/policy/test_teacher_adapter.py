"""A teacher's adapter: PEFT's own numbers, and no trace in the policy."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fuchsia_pl.policy.adapter import adapter_bytes
from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.contents import fingerprint
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.policy.teacher_adapter import SETTING, TeacherAdapter
from fuchsia_pl.types import ConfigError
from tests.unit.policy.test_policy import PROMPT, ROWS, expected_logprobs, make_batch, make_policy, randomise

WEIGHTS = "adapter_model.safetensors"


def save_adapter(model: Path, folder: Path, dtype: str = "float32", **lora) -> Policy:
    """A policy with a random adapter, which is also in the folder."""
    policy = Policy(PolicyConfig("", dtype, lora=LoRASettings(**{"r": 4, "alpha": 8, **lora})), model, False)
    randomise(policy)
    policy.save_trained(folder)
    return policy


@pytest.mark.parametrize(
    "lora",
    [{}, {"r": 2, "alpha": 3}, {"r": 8, "use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}],
    ids=["the policy's kind", "another rank", "another scale", "other layers"],
)
def test_a_teachers_logprobs_are_those_of_a_policy_with_its_adapter_bit_for_bit(tiny_model, tmp_path, lora):
    teacher = save_adapter(tiny_model, tmp_path, **lora)
    policy, batch = make_policy(tiny_model), make_batch()
    randomise(policy)
    found = policy.teacher_logprobs(batch, TeacherAdapter(str(tmp_path), tiny_model))
    assert torch.equal(found, teacher.evaluated_output(batch).logprobs)
    assert (found - policy.evaluated_output(batch).logprobs).abs().max() > 0.1
    # PEFT itself, with its own loader and without this project's forward.
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path)
    for row, sampled in enumerate(ROWS):
        expected = expected_logprobs(model, PROMPT, sampled)
        at = next(index for index, sample in enumerate(batch.samples) if len(sample.advantages) == len(sampled))
        torch.testing.assert_close(found[at][batch.loss_mask[at]], expected, msg=f"row {row}")


@pytest.mark.parametrize("autocasts", [False, True])
def test_a_teacher_equal_to_the_policy_has_its_logprobs_bit_for_bit_in_bfloat16(tiny_model, tmp_path, autocasts):
    policy = save_adapter(tiny_model, tmp_path, dtype="bfloat16")
    teacher, batch = TeacherAdapter(str(tmp_path), tiny_model), make_batch(temperature=0.7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        found, own = policy.teacher_logprobs(batch, teacher), policy.evaluated_output(batch).logprobs
    assert torch.equal(found, own)


def test_a_teacher_leaves_no_trace_in_the_policy(tiny_model, tmp_path):
    save_adapter(tiny_model, tmp_path / "teacher")
    policy, batch = make_policy(tiny_model, dropout=0.3), make_batch()
    randomise(policy)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    frozen = fingerprint([p for p in policy.parameters() if not p.requires_grad])
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    own, reference = policy.evaluated_output(batch).logprobs, policy.reference_logprobs(batch)
    teacher = TeacherAdapter(str(tmp_path / "teacher"), tiny_model)
    for _ in range(2):
        policy.teacher_logprobs(batch, teacher)
    assert policy.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert fingerprint([p for p in policy.parameters() if not p.requires_grad]) == frozen
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trained
    assert torch.equal(policy.evaluated_output(batch).logprobs, own)
    assert torch.equal(policy.reference_logprobs(batch), reference)
    policy.save_trained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / WEIGHTS).keys() == load_file(tmp_path / "teacher" / WEIGHTS).keys()
    assert sorted(file.name for file in (tmp_path / "saved").iterdir() if file.is_dir()) == []
    policy.output(batch).logprobs.sum().backward()
    assert all(p.grad is not None for p in policy.trainable_parameters())


def test_hooks_are_removed_after_a_failure_too(tiny_model, tmp_path):
    save_adapter(tiny_model, tmp_path)
    policy, batch = make_policy(tiny_model), make_batch()
    own = policy.evaluated_output(batch).logprobs
    with (
        pytest.raises(KeyError),
        TeacherAdapter(str(tmp_path), tiny_model).applied(policy.causal_lm, batch.input_ids.device),
    ):
        raise KeyError
    assert torch.equal(policy.evaluated_output(batch).logprobs, own)


def test_without_an_adapter_the_teacher_is_the_reference(tiny_model, tmp_path):
    policy, batch = make_policy(tiny_model), make_batch()
    randomise(policy)
    assert torch.equal(policy.teacher_logprobs(batch, None), policy.reference_logprobs(batch))
    start = save_adapter(tiny_model, tmp_path)
    continued = make_policy(tiny_model, init_from=str(tmp_path))
    randomise(continued)
    assert torch.equal(continued.teacher_logprobs(batch, None), start.evaluated_output(batch).logprobs)


def test_layers_with_weights_in_the_other_order_are_adapted_too(tmp_path):
    """GPT-2's Conv1D holds the transpose of a linear layer's weight."""
    config = GPT2Config(vocab_size=44, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    teacher = save_adapter(tmp_path / "model", tmp_path / "teacher")
    policy, batch = make_policy(tmp_path / "model"), make_batch()
    found = policy.teacher_logprobs(batch, TeacherAdapter(str(tmp_path / "teacher"), tmp_path / "model"))
    assert torch.equal(found, teacher.evaluated_output(batch).logprobs)


def test_an_adapter_that_does_not_fit_is_one_line(tiny_model, tmp_path):
    save_adapter(tiny_model, tmp_path / "good")
    assert adapter_bytes(SETTING, str(tmp_path / "good")) == sum(
        4 * tensor.numel() for tensor in load_file(tmp_path / "good" / WEIGHTS).values()
    )
    tensors = load_file(tmp_path / "good" / WEIGHTS)
    first = next(iter(tensors))

    def broken(name: str, tensors, **settings) -> str:
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((tmp_path / "good/adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(ConfigError) as error:
            TeacherAdapter(str(folder), tiny_model)
        assert str(error.value).startswith(f"data.teacher.adapter={str(folder)!r} ")
        return str(error.value)

    assert f"{first} is missing" in broken("missing", {name: t for name, t in tensors.items() if name != first})
    assert "a.lora_A.weight is unexpected" in broken("extra", {**tensors, "a.lora_A.weight": torch.zeros(1)})
    assert f"{first} has shape" in broken("shape", {**tensors, first: torch.zeros(3, 3)})
    endless = {**tensors, first: torch.full_like(tensors[first], torch.nan)}
    assert f"values in {first} that are not finite" in broken("endless", endless)
    assert "is not a plain LoRA adapter" in broken("dora", tensors, use_dora=True)
    with pytest.raises(ConfigError, match=r"data.teacher.adapter='nowhere' is not the folder of a PEFT adapter"):
        TeacherAdapter("nowhere", tiny_model)
