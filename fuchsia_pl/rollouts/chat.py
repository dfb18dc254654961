"""Between conversations and ids. Nothing that was sampled ever passes through here towards ids."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fuchsia_pl.envs.tools.convention import PLAIN, ToolConvention, instructions
from fuchsia_pl.envs.tools.spec import ToolSpec
from fuchsia_pl.rollouts.probes import (
    QUESTION,
    TEMPLATE_ERRORS,
    after_turn,
    native_convention,
    rewrites_earlier_turns,
    with_call_id,
)
from fuchsia_pl.types import ConfigError, Message


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ConfigError: Its files are missing or broken.
    """
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # a broken file may lead to any error inside of the libraries that read it
        words = " ".join(str(error).split())
        raise ConfigError(
            f"the folder {folder} has no tokenizer that can be loaded ({type(error).__name__}: {words}): put the model's own "
            "there (`tokenizer.save_pretrained(…)`)"
        ) from error


class Chat:
    """A model's tokenizer and chat template.

    Args:
        folder: The model folder.

    Raises:
        ConfigError: There is no tokenizer, or it has no chat template.
    """

    def __init__(self, folder: str | Path) -> None:
        self._tokenizer = load_tokenizer(folder)
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer in {folder} has no chat template, so a conversation cannot become ids: use an instruction-tuned "
                "model, or save a template with the tokenizer (`tokenizer.chat_template = …; tokenizer.save_pretrained(…)`)"
            )
        self.stop_token_ids = end_of_turn_ids(Path(folder), self._tokenizer.eos_token_id)

    @cached_property
    def rewrites_earlier_turns(self) -> bool:
        """Whether the template would not show an earlier turn as it was written: some leave its thinking out."""
        return rewrites_earlier_turns(self._render_text)

    def convention(self, tools: Sequence[ToolSpec]) -> ToolConvention:
        """How this model writes calls of these tools: its template's own way if it has one, else the plain one."""
        return native_convention(self._render_text, tools) or PLAIN

    def render(
        self, messages: list[Message], tools: Sequence[ToolSpec] = (), convention: ToolConvention = PLAIN
    ) -> list[int]:
        """The prompt's ids, up to and including the header of the policy's turn.

        Args:
            messages: The conversation so far.
            tools: What the policy may call.
            convention: How.

        Raises:
            ConfigError: The template cannot render it.
        """
        return self._encode(self._prompt_text(messages, tools, convention))

    def bridge(
        self, messages: list[Message], responses: list[Message], last_id: int | None, tools: Sequence[ToolSpec] = ()
    ) -> list[int]:
        """The ids between what the policy wrote and what it writes next: end of turn, responses, header, as the template says.

        The template is asked about an exchange in which a placeholder stands for the policy's turn, so nothing that was
        sampled is encoded and no earlier turn is rendered again. A special token in a response is spelled out as text:
        what a tool prints must not end a turn.

        Args:
            messages: The conversation that was first rendered.
            responses: What the environment answers, one message or several.
            last_id: The last sampled id. Where it ended the turn, that token is not repeated.
            tools: The tools of the prompt, where the template renders them.

        Raises:
            ConfigError: The template cannot render the exchange, or not so that the policy's turn stands in it once.
        """
        if any(token in message["content"] for message in responses for token in self._special_tokens):
            shown = [{**m, "content": _placeholder(i)} for i, m in enumerate(responses)]
            text = after_turn(self._render_text, messages, shown, tools)
            ids = self._encode_around(text, [m["content"] for m in responses])
        else:
            ids = self._encode(after_turn(self._render_text, messages, responses, tools))
        ended = last_id in self.stop_token_ids and ids[:1] == [last_id]
        return ids[1:] if ended else ids

    def encode_turn(self, text: str) -> list[int]:
        """The ids of a turn that somebody wrote in the policy's place, its end included. For checks of an environment."""
        ending = self._encode(after_turn(self._render_text, [QUESTION], [QUESTION], ()))[:1]
        end = ending if ending[0] in self.stop_token_ids else self.stop_token_ids[:1]
        return [*self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), *end]

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def raw_text(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def turn_text(self, token_ids: Sequence[int]) -> str:
        """The text of a turn, special tokens included but for the one that ended it."""
        ended = bool(token_ids) and token_ids[-1] in self.stop_token_ids
        return self.raw_text(token_ids[:-1] if ended else token_ids)

    def without_special_tokens(self, text: str) -> str:
        """A raw text without the special tokens in it."""
        for token in self._special_tokens:
            text = text.replace(token, "")
        return text

    @cached_property
    def _special_tokens(self) -> list[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        return [str(token.content) for token in added if token.special]

    def _prompt_text(self, messages: list[Message], tools: Sequence[ToolSpec], convention: ToolConvention) -> str:
        try:
            if convention.is_native or not tools:
                return self._render_text(messages, True, tools if convention.is_native else ())
            return self._explained(messages, instructions(tools))
        except TEMPLATE_ERRORS as error:
            raise ConfigError(
                f"the model's chat template cannot render the roles {[m.get('role') for m in messages]} ({error}): return other "
                "messages from the environment's messages(item), or use another model"
            ) from error

    def _explained(self, messages: list[Message], explanation: str) -> str:
        """The prompt with an explanation in its system message, or before the question where the template has no such role."""
        system, rest = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
        words = "\n\n".join([*(m["content"] for m in system), explanation])
        try:
            return self._render_text([{"role": "system", "content": words}, *rest], True, ())
        except TEMPLATE_ERRORS:
            first = {**rest[0], "content": f"{words}\n\n{rest[0]['content']}"}
            return self._render_text([first, *rest[1:]], True, ())

    def _render_text(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: Sequence[ToolSpec]
    ) -> str:
        return self._tokenizer.apply_chat_template(
            [with_call_id(message) for message in messages],
            tools=[tool.for_template() for tool in tools] or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _encode_around(self, text: str, contents: list[str]) -> list[int]:
        ids: list[int] = []
        for index, content in enumerate(contents):
            before, _, text = text.partition(_placeholder(index))
            ids += self._encode(before)
            ids += self._tokenizer.encode(content, add_special_tokens=False, split_special_tokens=True)
        return ids + self._encode(text)


def end_of_turn_ids(folder: Path, eos_token_id: int | None) -> tuple[int, ...]:
    """Every id that ends a turn: the tokenizer's own and those that the model's generation config lists.

    Only these are taken from the generation config; its sampling values never reach the engine.
    """
    file = folder / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ids = {eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    return tuple(sorted(token for token in ids if token is not None))


def _placeholder(index: int) -> str:
    return f"fuchsiaresponse{index}placeholder"
