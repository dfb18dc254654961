"""The Modelfile of Ollama, for a GGUF file."""

from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

MODELFILE = "Modelfile"
START, END = "<|im_start|>", "<|im_end|>"
QUESTION, ANSWER = "a question", "an answer"
CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def modelfile(tokenizer: PreTrainedTokenizerFast, gguf_name: str, temperature: float | None = None) -> str:
    """The text of a Modelfile.

    A chat template of the ChatML family is written in Ollama's own language, with the system text that it adds to every
    conversation. For any other, Ollama uses the template in the GGUF file.

    Args:
        tokenizer: The tokenizer with its chat template.
        gguf_name: Name of the GGUF file in the same folder.
        temperature: Sampling temperature; None is Ollama's default.
    """
    lines = [f"FROM ./{gguf_name}"]
    system = chatml_system(tokenizer)
    if system is not None:
        lines.append(f'TEMPLATE """{CHATML}"""')
        if system and '"""' not in system:
            lines.append(f'SYSTEM """{system}"""')
    if isinstance(tokenizer.eos_token, str) and '"' not in tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    if temperature is not None:
        lines.append(f"PARAMETER temperature {temperature:g}")
    return "\n".join(lines) + "\n"


def chatml_system(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The system text that a ChatML template adds by itself, "" for none; None if the template is of another family."""
    user, assistant = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    asked, answered = f"{START}user\n{QUESTION}{END}\n", f"{START}assistant\n{ANSWER}{END}\n"
    head, opened = f"{START}system\n", f"{START}assistant\n"
    try:
        first = _rendered(tokenizer, [user])
        second = _rendered(tokenizer, [user, assistant, user])
        own = _rendered(tokenizer, [{"role": "system", "content": ANSWER}, user])
    except (TemplateError, ValueError, TypeError, AttributeError):
        return None
    prefix = first.removesuffix(asked + opened)
    if prefix == first or second != prefix + asked + answered + asked + opened:
        return None
    if own != f"{head}{ANSWER}{END}\n{asked}{opened}":
        return None
    is_system = prefix.startswith(head) and prefix.endswith(f"{END}\n")
    if prefix and not is_system:
        return None
    return prefix.removeprefix(head).removesuffix(f"{END}\n")


def _rendered(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text if isinstance(text, str) else ""
