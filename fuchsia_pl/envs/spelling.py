"""Encodes text of items and tools as text: the name of an added token in it, such as `<|im_end|>`, becomes no control id.

A mark of letters and digits, the cut, is inserted into every such name before the chat template renders the messages. All other
characters pass through the template unchanged, so trimming and JSON escaping work as usual. In the rendered text only the
template's own tokens are whole. They are replaced by aliases, and the cuts are removed. Then a copy of the tokenizer, in which
the added tokens have only the aliases as names, encodes the result in one piece. Ordinary text keeps its usual ids.
"""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fuchsia_pl.envs.tools.spec import ToolSpec
from fuchsia_pl.types import ConfigError, Message

MARK_LETTERS = "ghjkmnpqrstuvwyz"  # no hex digits
MARK_TRIES = 1000
# Fields of a message and of a call that templates compare with fixed words. Their values are not text.
KINDS = ("role", "type")
# Fields of a message with values that have such fields.
NESTED = ("tool_calls", "function")


class Spelling:
    """Encodes rendered conversations in which the content of messages and tools is plain text.

    Added tokens that are white space are ordinary text. In a message of the role "assistant", added tokens that are not special,
    such as `<think>` or `<tool_call>`, are not cut, because the message shows the format in which the policy writes.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._names = {i: str(t.content) for i, t in added.items() if len(_printed(str(t.content))) > 1}
        self._special = frozenset(token_id for token_id in self._names if added[token_id].special)
        self._nonce = random_mark(self._names.values())
        self._alias_nonce = f"x{secrets.token_hex(8)}"
        firsts = {name[0] for token in self._names.values() for name in (token, _printed(token))}
        self._firsts = frozenset(character for first in firsts for character in (first, first.lower(), first.upper()))

    @property
    def control_ids(self) -> AbstractSet[int]:
        """The ids of added tokens that are not ordinary text."""
        return self._names.keys()

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with a cut in every name of an added token in their texts. Roles and names of fields are not cut."""
        return [self._fields(m, self._special if m.get("role") == "assistant" else self.control_ids) for m in messages]

    def texts(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with a cut in every name of an added token, in those of the assistant too.

        A model that scores a conversation reads what a policy wrote. Nothing in it is a token of that model's own.
        """
        return [self._fields(message, self.control_ids) for message in messages]

    def tools(self, tools: Sequence[ToolSpec]) -> list[ToolSpec]:
        """Tools with a cut in every name of an added token."""
        every = self.control_ids
        return [
            replace(
                tool,
                name=self._cut(tool.name, every),
                description=self._cut(tool.description, every),
                parameters=self._cut(tool.parameters, every),
            )
            for tool in tools
        ]

    def joined(self, text: str) -> str:
        """A rendered text without its cuts."""
        return text.replace(self._nonce, "")

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered text. A whole name of an added token becomes its id, a name with a cut becomes text."""
        if self._nonce not in text:
            return self._tokenizer.encode(text, add_special_tokens=False)
        pieces, position = [], 0
        for token_id, start, end in self._found(text, self.control_ids):
            pieces += [text[position:start], self._alias(token_id)]
            position = end
        tokenizer, own_ids = self._aliased
        ids = tokenizer.encode(self.joined("".join([*pieces, text[position:]])), add_special_tokens=False).ids
        return [own_ids.get(token_id, token_id) for token_id in ids]

    def _fields(self, value: Any, token_ids: AbstractSet[int]) -> Any:
        """A message, or a call of a tool in it, with a cut in every name of these tokens in its texts."""
        if isinstance(value, list | tuple):
            return [self._fields(entry, token_ids) for entry in value]
        if not isinstance(value, Mapping):
            return self._cut(value, token_ids)
        return {
            name: entry
            if name in KINDS and isinstance(entry, str) and entry.isidentifier()
            else (self._fields if name in NESTED else self._cut)(entry, token_ids)
            for name, entry in value.items()
        }

    def _cut(self, value: Any, token_ids: AbstractSet[int]) -> Any:
        """A JSON value with a cut in every name of these tokens, in its keys too."""
        if isinstance(value, str):
            return self._cut_text(value, token_ids)
        if isinstance(value, Mapping):
            return {self._cut(key, token_ids): self._cut(entry, token_ids) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._cut(entry, token_ids) for entry in value]
        return value

    def _cut_text(self, text: str, token_ids: AbstractSet[int]) -> str:
        if text.isascii() and self._firsts.isdisjoint(text):
            return text  # most texts; others pass through the tokenizer, which may normalise them
        found = self._found(text, token_ids)
        # The match may include white space around the name, or another Unicode form of it.
        cuts = {max(text.find(self._names[token_id], start, end), start) + 1 for token_id, start, end in found}
        while found:
            text = self._with_cuts(text, cuts)
            # The rest of a name may contain or begin another one. All characters of these are separated; otherwise a text
            # would be encoded once for each character of the longest name.
            found = self._found(text, token_ids)
            cuts = {position for _, start, end in found for position in range(start, end + 1)}
        return text

    def _with_cuts(self, text: str, positions: AbstractSet[int]) -> str:
        edges = [0, *sorted(positions), len(text)]
        return self._nonce.join(text[start:end] for start, end in pairwise(edges))

    def _found(self, text: str, token_ids: AbstractSet[int]) -> list[tuple[int, int, int]]:
        """Added tokens that the tokenizer finds in a text: id, start and end."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        unknown = self._tokenizer.unk_token_id
        return [
            (token_id, start, end)
            for token_id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if token_id in token_ids
            and end - start > 1
            # Every character outside the vocabulary has this id.
            and (token_id != unknown or self._names[token_id] in text[start:end])
        ]

    def _alias(self, token_id: int) -> str:
        return f"{self._alias_nonce}x{token_id}x"

    @cached_property
    def _aliased(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with aliases as names of the added tokens, and the added tokens' ids by those of the aliases."""
        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        content["post_processor"] = content["truncation"] = content["padding"] = None
        for token in content["added_tokens"]:
            if token["id"] in self._names:
                token["content"] = self._alias(token["id"])
        # If the model's own vocabulary lists the names, it could merge ordinary text into one.
        _rename(content["model"], {name: self._alias(token_id) for token_id, name in self._names.items()})
        tokenizer = Tokenizer.from_str(json.dumps(content))
        given = {tokenizer.token_to_id(self._alias(token_id)): token_id for token_id in self._names}
        return tokenizer, {theirs: ours for theirs, ours in given.items() if theirs is not None}


def random_mark(names: Iterable[str]) -> str:
    """A random mark that no content contains: a letter, 16 hex digits, and another letter. No part of it looks like its start.

    With text on both sides it forms none of some names: a name that came back with each mark would be marked for ever.

    Args:
        names: Names of added tokens.

    Raises:
        ConfigError: The names leave no mark.
    """
    lowered = [name.lower() for name in names]
    for _ in range(MARK_TRIES):
        first, last = secrets.SystemRandom().sample(MARK_LETTERS, 2)
        mark = f"{first}{secrets.token_hex(8)}{last}"
        if not any(_forms(name, mark) for name in lowered):
            return mark
    raise ConfigError(
        "the tokenizer's added tokens include so many short names of letters and digits that texts cannot be told from them: set "
        "data.sampling.special_tokens_in_text to true, which reads such names in texts as tokens"
    )


def _forms(name: str, mark: str) -> bool:
    """Whether a mark contains a name, or may form it with the text before or behind.

    >>> _forms("ab", "g0ab1h"), _forms("xg", "g0h"), _forms("hx", "g0h"), _forms("<g>", "g0h")
    (True, True, True, False)
    """
    parts = range(1, len(name))
    return name in mark or any(mark.startswith(name[at:]) or mark.endswith(name[:at]) for at in parts)


def _printed(name: str) -> str:
    """A token's name without white space, including the character that some tokenizers use for a space.

    >>> _printed("\u2581\u2581"), _printed(" <mask>")
    ('', '<mask>')
    """
    return name.replace("\u2581", " ").strip()


def _rename(model: dict[str, Any], aliases: Mapping[str, str]) -> None:
    """Renames entries of the vocabulary in a `tokenizer.json`, and removes the merges that produce them.

    >>> model = {"type": "BPE", "vocab": {"<": 0, "s>": 1, "<s>": 2}, "merges": [["<", "s>"]], "unk_token": "<s>"}
    >>> _rename(model, {"<s>": "alias"})
    >>> model["vocab"], model["merges"], model["unk_token"]
    ({'<': 0, 's>': 1, 'alias': 2}, [], 'alias')
    """
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {aliases.get(name, name): token_id for name, token_id in vocabulary.items()}
    elif isinstance(vocabulary, list):  # Unigram: names with scores
        model["vocab"] = [[aliases.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") in aliases:
        model["unk_token"] = aliases[model["unk_token"]]
    if "merges" in model:
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [
            [left, right] for left, right in pairs if aliases.keys().isdisjoint((left, right, left + right))
        ]
