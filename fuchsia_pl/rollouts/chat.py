"""Between conversations and ids. Nothing that was sampled ever passes through here towards ids."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from fuchsia_pl.types import ConfigError, Message


class Chat:
    """A model's tokenizer and chat template.

    Args:
        folder: The model folder.

    Raises:
        ConfigError: The tokenizer has no chat template.
    """

    def __init__(self, folder: str | Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(str(folder))
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer in {folder} has no chat template, so a conversation cannot become ids: use an instruction-tuned "
                "model, or save a template with the tokenizer (`tokenizer.chat_template = …; tokenizer.save_pretrained(…)`)"
            )
        self.stop_token_ids = end_of_turn_ids(Path(folder), self._tokenizer.eos_token_id)

    def render(self, messages: list[Message]) -> list[int]:
        """The prompt's ids, up to and including the header of the policy's turn."""
        return list(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def text(self, token_ids: list[int] | tuple[int, ...]) -> str:
        """The text of ids without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def raw_text(self, token_ids: list[int]) -> str:
        """The text of ids, special tokens included."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def end_of_turn_ids(folder: Path, eos_token_id: int | None) -> tuple[int, ...]:
    """Every id that ends a turn: the tokenizer's own and those that the model's generation config lists.

    Only these are taken from the generation config; its sampling values never reach the engine.
    """
    file = folder / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ids = {eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    return tuple(sorted(token for token in ids if token is not None))
