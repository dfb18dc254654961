"""A small model with a byte-level tokenizer, and a run folder with an adapter for it, without a training."""

import json
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
TEXTS = ["What is 12 plus 34? Answer with a number.", "über den Fluß\n\n  zwei", "<|im_start|>user\nhello<|im_end|>"]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}


def save_tokenizer(folder: Path, template: str | None = CHATML, split: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:2] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def save_base(folder: Path, kind: str = "llama", **settings: Any) -> Path:
    """A random model of two layers with more embeddings than tokens."""
    torch.manual_seed(1)
    tokenizer = save_tokenizer(folder)
    sizes = {**SIZES, "vocab_size": len(tokenizer) + 5, **({"head_dim": 128} if kind == "qwen3" else {}), **settings}
    config = CONFIGS[kind](bos_token_id=1, eos_token_id=2, pad_token_id=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms are 1 and biases 0 in a fresh model
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def save_run(root: Path, base: Path, **policy: Any) -> Path:
    """The folder of a finished run, `root/tiny/0`."""
    run = root / "tiny" / "0"
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False
    )
    peft.get_peft_model(model, settings).save_pretrained(run / "adapter")
    config = {
        "seed_everything": 3,
        "model": {"policy": {"name": str(base), "dtype": "float32", "lora": {"r": 4, "alpha": 8}, **policy}},
        "data": {"environment": {"class_path": "tests.doubles.TinyEnvironment", "init_args": {"key": "secret"}}},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def save_held_out(run: Path) -> None:
    """Two evaluations, with intervals."""
    lines = [
        {
            "step": step,
            "split": "validation",
            "num_items": 64,
            "num_samples": 1,
            "environment": "tests.doubles.TinyEnvironment",
            "figures": {"rollout/accuracy": {"value": value, "low": value - 0.1, "high": value + 0.1}},
        }
        for step, value in ((0, 0.25), (2, 0.75))
    ]
    (run / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@torch.no_grad()
def greedy_ids(model: torch.nn.Module, ids: list[int], number: int = 12) -> list[int]:
    """The most likely continuation, without the library's generation and its settings."""
    ids = list(ids)
    for _ in range(number):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-number:]
