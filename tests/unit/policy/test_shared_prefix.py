"""Rows with a shared prefix are computed as one sequence, with the same results."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fuchsia_pl.batch import PrefixGroup, StepInfo
from fuchsia_pl.policy import shared_prefix
from fuchsia_pl.policy.config import CheckpointingSettings, LoRASettings, PolicyConfig
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.policy.shared_prefix import SharedPrefixLayout, lay_out
from fuchsia_pl.rollouts.batcher import make_batches, split_balanced
from fuchsia_pl.types import ConfigError, Sample
from tests.doubles import denominators, make_sample

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
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
MODELS = {
    "qwen3, grouped heads": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "gemma2, every other layer with a window of 4": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, sliding_window=4)
    ),
    "mistral, a window of 5": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=5)),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            **NO_DROPOUT,
        )
    ),
}
UNFIT = {
    "mamba, no attention": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    ),
    "qwen2_moe, which windows its masks alone": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SMALL,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_experts=2,
            num_experts_per_tok=2,
            use_sliding_window=True,
            sliding_window=4096,  # far wider than the rows that the check compares
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "bloom, biases by distance in the sequence": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    ),
}


def conversation(prompt, turns, item: int) -> Sample:
    """Turns of the policy with three tokens of the environment after each but the last."""
    sample = make_sample(prompt, turns[0], 1.0)
    for turn in turns[1:]:
        sample.rollout._extend([41, 42, 43], [False] * 3, [0.0] * 3)
        sample.rollout._extend(list(turn), [True] * len(turn), [-1.0] * len(turn))
    sample.rollout.item_index = item
    return Sample(sample.rollout, tuple(0.3 * k - 0.5 for k in range(sum(len(turn) for turn in turns))))


def samples() -> list[Sample]:
    """Three items: siblings of different lengths, with one more turn, one sampled twice, one a part of another; one alone."""
    first, second = [5, 6, 7, 8, 9, 10], [5, 6, 20]
    return [
        conversation(first, [[11, 12, 13, 2]], 0),
        conversation(first, [[14, 2], [15, 16, 2]], 0),
        conversation(first, [[17]], 0),
        conversation(second, [[21, 22]], 1),
        conversation(second, [[21, 22]], 1),
        conversation(second, [[21, 22, 23, 24]], 1),
        conversation([30, 31, 32], [[33, 34]], 2),
    ]


def policy_of(folder, shared: str, **settings) -> Policy:
    torch.manual_seed(1)
    lora = LoRASettings(r=4, alpha=8, target_modules=settings.pop("target_modules", "all-linear"))
    policy = Policy(PolicyConfig("", "float32", lora, shared_prefix=shared, **settings), folder, with_reference=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy.train()


def scored(policy: Policy, number: int = 1):
    """Logprobs of each sampled token in the samples' order, and the gradient of their sum weighted by the advantages."""
    rows, own = {}, samples()
    for batch in make_batches(split_balanced(own, number, policy.shares_prefix), StepInfo(0, denominators(1), 0)):
        logprobs = policy.output(batch).logprobs
        (logprobs * batch.advantages).sum().backward()
        for sample, row, mask in zip(batch.samples, logprobs.detach(), batch.loss_mask, strict=True):
            rows[id(sample)] = row[mask]
    gradients = [parameter.grad for parameter in policy.trainable_parameters()]
    return torch.cat([rows[id(sample)] for sample in own]), gradients


def assert_same(first, second) -> None:
    torch.testing.assert_close(first[0], second[0], rtol=1e-5, atol=1e-5)
    for got, expected in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(expected.abs().max().item(), 1.0))


def test_the_layout_drawn_with_letters():
    # rows P Q A B | P Q C: one prefix of two, branches of two and one; then a row alone, which is all prefix: X Y Z
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 0], [7, 8, 9, 0]])
    layout = lay_out(ids, (4, 3, 3), (PrefixGroup(2, 2), PrefixGroup(1, 3)))
    assert layout.input_ids.tolist() == [[1, 2, 3, 4, 5, 7, 8, 9]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    assert layout.places.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0], [5, 6, 7, 0]]
    assert layout.prefix_places.tolist() == [[0, 1, 0], [5, 6, 7]]
    assert layout.branch_places.tolist() == [[2, 3], [4, 0]]
    assert layout.branch_groups.tolist() == [0, 0]
    # Keys P Q and one of padding, then the branch itself: 2 1 - 0 - tokens before its first token, 3 2 - 1 0 before the second.
    seen = {window: (layout.mask(window, torch.float32)[:, 0] == 0).int().tolist() for window in (None, 2)}
    assert seen[None] == [[[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]] * 2
    assert seen[2] == [[[0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]] * 2
    assert layout.mask(None, torch.float32).unique().tolist() == [-torch.inf, 0.0]
    # computed are P Q - X Y Z, then A B, C -
    assert layout.outputs.tolist() == [0, 1, 6, 7, 8, 3, 4, 5]


@pytest.mark.parametrize("model", MODELS)
def test_a_shared_prefix_changes_neither_logprobs_nor_gradients(model, tmp_path):
    torch.manual_seed(0)
    MODELS[model]().save_pretrained(tmp_path)
    targets = ["c_attn", "c_fc"] if "gpt2" in model else "all-linear"
    plain = policy_of(tmp_path, "never", target_modules=targets)
    assert not plain.shares_prefix
    expected = scored(plain)
    for number in (1, 2, 5):
        shared = policy_of(tmp_path, "always", target_modules=targets)
        assert shared.shares_prefix
        assert_same(scored(shared, number), expected)
    assert expected[0].std() > 0.1


def test_fewer_tokens_are_computed(tiny_model, monkeypatch):
    seen = []
    original = shared_prefix.lay_out
    monkeypatch.setattr(
        "fuchsia_pl.policy.policy.lay_out", lambda *args: seen.append(original(*args)) or original(*args)
    )
    scored(policy_of(tiny_model, "always"))
    # inputs are 9, 13, 6 | 4, 4, 6 | 4; the prefixes of 6 and 4 (prompt and 21: 22 is the last token of two rows) count once
    assert seen[0].input_ids.shape == (1, 46 - 2 * 6 - 2 * 4)


def test_siblings_do_not_see_each_other(tiny_model):
    policy = policy_of(tiny_model, "always").eval()
    prompt = [5, 6, 7]
    rows = [conversation(prompt, [[8, 9, 10]], 0), conversation(prompt, [[11, 12, 13, 14]], 0)]
    others = [rows[0], conversation(prompt, [[20, 21, 22, 23]], 0)]
    first, second = (
        policy.output(make_batches([[pair]], StepInfo(0, denominators(1), 0))[0]).logprobs.detach()
        for pair in (rows, others)
    )
    assert torch.equal(first[0], second[0])
    assert not torch.isclose(first[1], second[1])[2:].any()


@pytest.mark.parametrize("model", UNFIT)
def test_a_model_that_is_more_than_attention_gets_plain_rows(model, tmp_path):
    torch.manual_seed(0)
    UNFIT[model]().save_pretrained(tmp_path)
    targets = {"mamba": ["in_proj"], "bloom": ["query_key_value"]}.get(model.partition(",")[0], ["q_proj"])
    policy = policy_of(tmp_path, "auto", target_modules=targets)
    assert not policy.shares_prefix
    assert_same(scored(policy), scored(policy_of(tmp_path, "never", target_modules=targets)))
    with pytest.raises(ConfigError, match=r'shared_prefix is "always", but the outputs of \w+ForCausalLM change'):
        policy_of(tmp_path, "always", target_modules=targets)


def test_the_check_notices_a_branch_that_sees_its_sibling_or_not_its_prefix(tiny_model, monkeypatch):
    original = SharedPrefixLayout._visible
    for wrong in (
        lambda layout, window: torch.ones_like(original(layout, window)),  # the future and the padding are visible
        lambda layout, window: original(
            replace(layout, prefix_lengths=0 * layout.prefix_lengths), window
        ),  # the prefix is not
    ):
        monkeypatch.setattr(SharedPrefixLayout, "_visible", wrong)
        assert not policy_of(tiny_model, "auto").shares_prefix
    monkeypatch.setattr(SharedPrefixLayout, "_visible", original)
    assert policy_of(tiny_model, "auto").shares_prefix


def test_the_reference_and_all_weights_learning_share_prefixes_too(tiny_model):
    results = []
    for shared in ("always", "never"):
        torch.manual_seed(0)
        config = PolicyConfig("", "float32", LoRASettings(enabled=False), shared_prefix=shared)
        policy = Policy(config, tiny_model, with_reference=True).train()
        (batch,) = make_batches(split_balanced(samples()[:3], 1, True), StepInfo(0, denominators(1), 0))
        results.append((policy.reference_logprobs(batch), scored_by(policy, batch)))
    torch.testing.assert_close(results[0][0], results[1][0])
    for got, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def scored_by(policy: Policy, batch) -> list[torch.Tensor]:
    policy.output(batch).logprobs.sum().backward()
    return [parameter.grad for parameter in policy.trainable_parameters()]


@pytest.mark.parametrize("shared", ["always", "never"])
@pytest.mark.parametrize("every_n_layers", [1, 2])
def test_checkpointing_changes_neither_logprobs_nor_gradients(tiny_model, shared, every_n_layers):
    settings = CheckpointingSettings(enabled=True, every_n_layers=every_n_layers)
    assert_same(scored(policy_of(tiny_model, shared, checkpointing=settings)), scored(policy_of(tiny_model, shared)))


def test_blocks_that_run_again_do_the_same_under_autocast_and_with_dropout(tiny_model):
    """PEFT would cast adapter inputs in one of the two runs, and torch would raise an error about their types."""
    settings = {"checkpointing": CheckpointingSettings(enabled=True)}
    gradients = []
    for each in (settings, {}):
        torch.manual_seed(1)
        lora = LoRASettings(r=4, alpha=8, dropout=0.3)
        policy = Policy(PolicyConfig("", "bfloat16", lora, **each), tiny_model, with_reference=False).train()
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.add_(0.1)
        (batch,) = make_batches(split_balanced(samples(), 1, True), StepInfo(0, denominators(1), 0))
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = policy.output(batch).logprobs.sum()
        loss.backward()
        gradients.append([parameter.grad for parameter in policy.trainable_parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    # without autocast the adapter's products are made in its own type again
    assert policy.output(batch).logprobs.isfinite().all()


def test_a_saved_model_names_no_attention_of_ours(tiny_model, tmp_path):
    config = PolicyConfig("", "float32", LoRASettings(enabled=False))
    policy = Policy(config, tiny_model, with_reference=False)
    assert policy.shares_prefix
    policy.save_trained(tmp_path)
    assert shared_prefix.ATTENTION_NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
