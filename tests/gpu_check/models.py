"""Models from configs, with random weights; their policies; rows and micro-batches of given sizes."""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from fuchsia_pl.batch import Batch, StepInfo
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches, split_balanced
from fuchsia_pl.samples import Sample
from tests.doubles import make_sample, save_tiny_model
from tests.gpu_check.machine import Machine

GROUP = 8
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.1,
    "max_position_embeddings": 32768,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
}
# Qwen3-0.6B and Qwen2.5-1.5B.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "0.6B": (
        "qwen3",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "1.5B": (
        "qwen2",
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "head_dim": 128,
        },
    ),
}
VOCABULARY = 151_936


def save_model(folder: Path, machine: Machine, kind: str = "llama", **settings: Any) -> Path:
    """Writes a model with random weights, and the tokenizer of the unit tests, which has a chat template."""
    save_tiny_model(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = KINDS[kind](**{**SMALL, **settings})
    with machine.device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, machine.dtype))
    model.save_pretrained(folder)
    return folder


def save_shape(folder: Path, machine: Machine, name: str, **settings: Any) -> Path:
    """Writes a model with the sizes of a published one."""
    kind, shape = SHAPES[name]
    common = {"vocab_size": VOCABULARY, "tie_word_embeddings": True, "initializer_range": 0.02}
    return save_model(folder, machine, kind, **{**common, **shape, **settings})


def make_policy(folder: Path, device: torch.device, dtype: str, **settings: Any) -> Policy:
    """A policy on a device, whose adapter is not zero and the same for the same model."""
    torch.manual_seed(0)
    policy = Policy(PolicyConfig("", dtype, **settings), folder, with_reference=False)
    perturb(policy, seed=0, scale=0.01)
    return policy.to(device).train()


@torch.no_grad()
def perturb(policy: Policy, seed: int, scale: float) -> None:
    """Sets the factors B of the adapter to random numbers of one scale, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def make_rows(num_prompts: int, prompt_tokens: int, own_tokens: int, vocabulary: int) -> list[Sample]:
    """Siblings with random ids, eight to a prompt."""
    numbers, samples = random.Random(0), []
    for item in range(num_prompts):
        prompt = [numbers.randrange(3, vocabulary) for _ in range(prompt_tokens)]
        for sibling in range(GROUP):
            sample = make_sample(prompt, [numbers.randrange(3, vocabulary) for _ in range(own_tokens)], 1.0)
            sample.rollout.item_index, sample.rollout.sibling = item, sibling
            samples.append(sample)
    return samples


def make_batch(samples: list[Sample], shares_prefix: bool, device: torch.device) -> Batch:
    """All rows as one micro-batch."""
    parts = split_balanced(samples, 1, shares_prefix)
    return make_batches(parts, StepInfo(0, count_denominators(samples, 1), 0))[0].to(device)


def backward(policy: Policy, batch: Batch, machine: Machine, dtype: str | None = None) -> torch.Tensor:
    """Forward and backward of the sum of the logprobs; returns them, [number of sampled tokens]."""
    policy.zero_grad(set_to_none=True)
    with machine.autocast(dtype):
        logprobs = policy.output(batch).logprobs
    logprobs[batch.loss_mask].sum().backward()
    return logprobs.detach()[batch.loss_mask]


def gradient(policy: Policy) -> torch.Tensor:
    """The gradient of all trained weights as one vector, on the CPU."""
    found = [p.grad for p in policy.trainable_parameters() if p.grad is not None]
    return torch.cat([each.detach().flatten().float().cpu() for each in found])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference of two vectors."""
    return ((found - expected).norm() / expected.norm()).item()
