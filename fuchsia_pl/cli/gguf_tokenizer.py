"""The tokenizer in a GGUF file: a byte-level BPE vocabulary, its merges, special tokens and chat template."""

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerFast

from fuchsia_pl.types import ConfigError

# How a text is split before the merges, by the name that llama.cpp has for it.
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "llama-bpe"
    ),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
ADVICE = "Export --to merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py"


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Writes a tokenizer.

    Args:
        writer: The file.
        tokenizer: The tokenizer with its chat template.
        vocab_size: Rows of the embedding matrix. Ids without a token get placeholders.

    Raises:
        ConfigError: It is not a byte-level BPE tokenizer whose splitting llama.cpp knows by a name.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ConfigError(
            f"a tokenizer of the kind {model.get('type')!r} cannot be written as GGUF here, only byte-level BPE. "
            f"{ADVICE}"
        )
    if described["normalizer"] not in (None, {"type": "NFC"}):
        raise ConfigError(
            f"a tokenizer with the normalizer {described['normalizer']} cannot be written as GGUF here. {ADVICE}"
        )
    tokens, kinds = _tokens(tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(described["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    _add_special(writer, tokenizer)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def split_name(pre_tokenizer: dict[str, Any] | None) -> str:
    """The name of a pre-tokenizer in llama.cpp.

    Raises:
        ConfigError: There is none, or it is not known here.

    >>> split_name({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True})
    'gpt-2'
    """
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    kinds = [part.get("type") for part in parts]
    if kinds and kinds[-1] == "ByteLevel" and not parts[-1].get("add_prefix_space"):
        if len(parts) == 1 and parts[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
            name = SPLITS.get(parts[0].get("pattern", {}).get("Regex"))
            if name is not None:
                return name
    raise ConfigError(
        f"a tokenizer that splits texts by {'+'.join(map(str, kinds))} with these settings has no name in llama.cpp that is "
        f"known here. {ADVICE}"
    )


def _tokens(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Tokens by id, and their types."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= vocab_size:
        raise ConfigError(
            f"the tokenizer has the id {max(by_id)}, and the model only {vocab_size} embeddings: they do not fit"
        )
    tokens, kinds = [], []
    added = tokenizer.added_tokens_decoder
    for index in range(vocab_size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index in added:
            kinds.append(gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED)
    return tokens, kinds


def _add_special(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    adders = {
        "bos_token_id": writer.add_bos_token_id,
        "eos_token_id": writer.add_eos_token_id,
        "unk_token_id": writer.add_unk_token_id,
        "pad_token_id": writer.add_pad_token_id,
    }
    ids = {name: getattr(tokenizer, name) for name in adders}
    for name, add in adders.items():
        if ids[name] is not None:
            add(ids[name])
    writer.add_add_bos_token(ids["bos_token_id"] is not None and tokenizer.encode("a")[:1] == [ids["bos_token_id"]])
    writer.add_add_space_prefix(False)
