"""Conversion between conversations and ids. Sampled ids are decoded for people, but never encoded again."""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from itertools import dropwhile
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fuchsia_pl.envs.spelling import Spelling
from fuchsia_pl.envs.thinking import without_thinking
from fuchsia_pl.envs.tools.convention import PLAIN, ToolConvention, instructions
from fuchsia_pl.envs.tools.spec import ToolSpec
from fuchsia_pl.rollouts.probes import (
    QUESTION,
    TEMPLATE_ERRORS,
    after_turn,
    native_convention,
    rewrites_earlier_turns,
    turn_edges,
)
from fuchsia_pl.rollouts.template import Template
from fuchsia_pl.types import ConfigError, Message


def load_tokenizer(folder: str | Path) -> Any:
    """Loads the tokenizer of a model folder.

    Raises:
        ConfigError: Its files are missing or broken.
    """
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # the libraries may raise anything on a broken file
        words = " ".join(str(error).split())
        raise ConfigError(
            f"the folder {folder} has no tokenizer that can be loaded ({type(error).__name__}: {words}): put the model's own "
            "there (`tokenizer.save_pretrained(…)`)"
        ) from error


class Chat:
    """A model's tokenizer and chat template.

    Args:
        folder: The model folder.
        template: A chat template that replaces the tokenizer's, "none" for no template (`ServedModel.chat_template`).
        started_at: Date that a template may write; None for the current time.
        special_tokens_in_text: Whether the name of an added token in a message becomes that token. Otherwise it is text.

    Raises:
        ConfigError: There is no tokenizer, or it cannot render conversations with these settings.
    """

    def __init__(
        self,
        folder: str | Path,
        template: str | None = None,
        started_at: datetime | None = None,
        special_tokens_in_text: bool = False,
    ) -> None:
        self._tokenizer = load_tokenizer(folder)
        if not self._tokenizer.is_fast:
            raise ConfigError(
                f"the tokenizer in {folder} has no tokenizer.json, without which the text of items and tools cannot be kept "
                "apart from control tokens: convert it, or use another model"
            )
        self.template = Template(self._tokenizer, template, started_at or datetime.now())
        self.stop_token_ids = end_of_turn_ids(Path(folder), self._tokenizer.eos_token_id)
        self._beginning: list[int] = []
        if self.template.is_plain:
            self._beginning, self.stop_token_ids = _plain_ends(self._tokenizer, folder)
        self._spelling = Spelling(self._tokenizer)
        self._special_tokens_in_text = special_tokens_in_text

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer."""
        return self._tokenizer

    @cached_property
    def rewrites_earlier_turns(self) -> bool:
        """Whether the template changes earlier turns. Some templates leave their thinking out."""
        return not self.template.is_plain and rewrites_earlier_turns(self.template)

    def convention(self, tools: Sequence[ToolSpec]) -> ToolConvention:
        """Format of the model's calls of these tools: the format of its template if it has one, else the plain one."""
        return native_convention(self.template, tools) or PLAIN

    def render(
        self, messages: list[Message], tools: Sequence[ToolSpec] = (), convention: ToolConvention = PLAIN
    ) -> list[int]:
        """The prompt's ids, up to and including the header of the policy's turn.

        Args:
            messages: The conversation so far.
            tools: Tools that the policy may call.
            convention: Format of the calls.

        Raises:
            ConfigError: The template cannot render it, or leaves the text of a message out.
        """
        spelled, spelled_tools = self._as_text(messages, tools)
        text = self._prompt_text(spelled, spelled_tools, convention)
        self._check_shown(self._spelling.joined(text), messages)
        return [*self._beginning, *self._spelling.encode(text)]

    def bridge(
        self,
        messages: list[Message],
        responses: list[Message],
        last_id: int | None,
        tools: Sequence[ToolSpec] = (),
        checks_text: bool = False,
    ) -> list[int]:
        """The ids between two turns of the policy: end of the turn, responses, header of the next turn.

        The template renders an exchange with a placeholder for the policy's turn. So sampled text is never encoded, and no
        earlier turn is rendered again.

        Args:
            messages: The conversation of the prompt.
            responses: The environment's responses, one message or several.
            last_id: The last sampled id. If it is one of the model's end-of-turn ids, no second end follows.
            tools: The tools of the prompt, if the template renders them.
            checks_text: Whether to check that the template shows the text of every response. Responses of environments are not
                checked: the policy may have caused them, and its text must not end the run.

        Raises:
            ConfigError: The template cannot render the exchange, or the policy's turn is not in it exactly once, or a text is
                missing.
        """
        spelled, spelled_tools = self._as_text(messages, tools)
        spelled_responses, _ = self._as_text(responses, ())
        text = after_turn(self.template, self.template.fitted(spelled), spelled_responses, spelled_tools)
        if checks_text:
            self._check_shown(self._spelling.joined(text), responses)
        ids = self._spelling.encode(text)
        if last_id not in self.stop_token_ids:
            return ids
        endings = self._turn_endings
        rest = ids[1:] if ids[:1] == [last_id] else ids
        return list(dropwhile(lambda token_id: token_id in endings, rest))

    def encode_turn(self, text: str) -> list[int]:
        """The ids of a turn that was not sampled, its end included. For checks of an environment."""
        ending = self._spelling.encode(after_turn(self.template, [QUESTION], [QUESTION], ()))[:1]
        end = ending if ending[0] in self.stop_token_ids else self.stop_token_ids[:1]
        return [*self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), *end]

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def raw_text(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text that each id adds, special tokens included. A character of several ids belongs to the last of them.

        Returns:
            One text per id. The text of an id in the middle of a character is empty.
        """
        tokenizer, stream = self._tokenizer.backend_tokenizer, DecodeStream(skip_special_tokens=False)
        pieces: list[str | None] = []
        for token in token_ids:
            try:
                pieces.append(stream.step(tokenizer, token))
            except Exception:  # of no narrower class: bytes that are no UTF-8 may break the state of the stream
                stream = DecodeStream(skip_special_tokens=False)
                pieces.append(stream.step(tokenizer, token))
        if pieces and pieces[-1] is None:  # the turn was cut within a character
            pieces[-1] = "\N{REPLACEMENT CHARACTER}"
        return [piece or "" for piece in pieces]

    def turn_text(self, token_ids: Sequence[int]) -> str:
        """The text of a turn with special tokens, without the one that ended it."""
        ended = bool(token_ids) and token_ids[-1] in self.stop_token_ids
        return self.raw_text(token_ids[:-1] if ended else token_ids)

    def without_special_tokens(self, text: str) -> str:
        """A raw text without its special tokens."""
        for token in self._special_tokens:
            text = text.replace(token, "")
        return text

    @cached_property
    def _special_tokens(self) -> list[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        return [str(token.content) for token in added if token.special]

    @cached_property
    def _turn_endings(self) -> set[int]:
        """The control tokens at the end of a turn that are not in the header of the next turn."""
        header, endings = turn_edges(self.template)
        control = self._spelling.control_ids
        ends = [token for text in endings for token in self._spelling.encode(text)[:1] if token in control]
        opening = [token for token in self._spelling.encode(header) if token in control][-1:]
        return set(ends) - set(opening)

    def _as_text(self, messages: list[Message], tools: Sequence[ToolSpec]) -> tuple[list[Message], Sequence[ToolSpec]]:
        """Messages and tools in which names of added tokens are text, unless the setting allows them as tokens."""
        if self._special_tokens_in_text:
            return messages, tools
        return self._spelling.messages(messages), self._spelling.tools(tools)

    def _prompt_text(self, messages: list[Message], tools: Sequence[ToolSpec], convention: ToolConvention) -> str:
        try:
            if tools and not convention.is_native:
                messages, tools = _explained(messages, instructions(tools)), ()
            return self.template(self.template.fitted(messages), True, tools)
        except TEMPLATE_ERRORS as error:
            raise ConfigError(
                f"the model's chat template cannot render the roles {[m.get('role') for m in messages]} ({error}): return other "
                "messages from the environment's messages(item), or use another template (model.policy.chat_template)"
            ) from error

    def _check_shown(self, text: str, messages: list[Message]) -> None:
        """Raises an error if the text of a message is missing from the prompt."""
        self.template.check_roles([message["role"] for message in self.template.fitted(messages)])
        missing = next((message for message in messages if not _is_shown(message, text)), None)
        if missing is not None:
            raise ConfigError(
                f"the model's chat template leaves out the text of a message of the role {missing['role']!r}, which begins with "
                f"{missing['content'][:80]!r}: use another template (model.policy.chat_template), or return other messages"
            )


def end_of_turn_ids(folder: Path, eos_token_id: int | None) -> tuple[int, ...]:
    """All ids that end a turn: the tokenizer's own and those of the model's generation config.

    The engine gets no other values of the generation config.
    """
    file = folder / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ids = {eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    return tuple(sorted(token for token in ids if token is not None))


def _plain_ends(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> tuple[list[int], tuple[int, ...]]:
    """Ids before any text and end ids of a tokenizer, for a model without a chat template.

    Raises:
        ConfigError: It has no end id, so no completion could end.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f'model.policy.chat_template is "none", and the tokenizer in {folder} has no end id: set its eos_token '
            "(`tokenizer.eos_token = …; tokenizer.save_pretrained(…)`)"
        )
    begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if begins else [], (tokenizer.eos_token_id,)


def _explained(messages: list[Message], explanation: str) -> list[Message]:
    """Messages with an explanation at the end of the system message."""
    system, rest = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    words = "\n\n".join([*(m["content"] for m in system), explanation])
    return [{"role": "system", "content": words}, *rest]


def _is_shown(message: Message, text: str) -> bool:
    """Whether a prompt contains a message's text, stripped, either unchanged or escaped as in JSON.

    For an assistant's message, the text after its thinking is enough: some templates leave earlier thinking out.

    >>> _is_shown({"role": "user", "content": " 2+2? "}, "user: 2+2?"), _is_shown({"role": "user", "content": "2+2?"}, "user:")
    (True, False)
    """
    content = message["content"].strip()
    if content in text:
        return True
    forms = [json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1]]
    if message["role"] == "assistant":
        forms.append(without_thinking(content).strip())
    return any(form in text for form in forms)
