"""Conversations as the ids that a reward model reads. No text in them becomes one of its control tokens."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fuchsia_pl.types import ConfigError, Message

# The day for templates that write today's date: the score of a conversation is the same on every day.
FIXED_DATE = datetime(2025, 1, 1)
PROBE = "fuchsiatextplaceholder"
# Form of a conversation for a tokenizer without a chat template.
PLAIN_FORM = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
# A tokenizer without a limit has this number or a larger one.
NO_LIMIT = 1_000_000


def check_revision(name: str, revision: str | None) -> None:
    """Rejects a revision of a local folder, which has none.

    Raises:
        ConfigError: It is given.
    """
    if revision is not None and Path(name).expanduser().is_dir():
        raise ConfigError(
            f"revision={revision!r} has no effect on the local folder {name}: leave it out, or name a model on the hub"
        )


def source(name: str, revision: str | None) -> dict[str, Any]:
    """The arguments of transformers' `from_pretrained` for a model. A checkpoint's own code is never run.

    >>> source("org/model", None)
    {'pretrained_model_name_or_path': 'org/model', 'revision': 'main', 'trust_remote_code': False}
    """
    path = Path(name).expanduser()
    place = str(path) if path.is_dir() else name
    return {"pretrained_model_name_or_path": place, "revision": revision or "main", "trust_remote_code": False}


class Transcript:
    """Encodes conversations for a reward model.

    With a chat template, a conversation has the form of the template, without the header of another turn. A template without a
    system role gets the system text before the first user message. Without a template, each message is `role: text`, blank lines
    are between messages, and the tokenizer adds its own first and last tokens.

    Args:
        name: Folder or hub id of the reward model.
        revision: Revision on the hub.
        chat_template: Replaces the tokenizer's template.

    Raises:
        ConfigError: There is no fast tokenizer, or the template does not show a user's and an assistant's text.
    """

    def __init__(self, name: str, revision: str | None, chat_template: str | None) -> None:
        from transformers import AutoTokenizer

        from fuchsia_pl.envs.spelling import Spelling

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(**source(name, revision))
        except Exception as error:  # the libraries may raise anything on a missing or broken file
            raise ConfigError(
                f"the reward model {name!r} has no tokenizer that can be loaded ({words_of(error)}): check the spelling, the "
                "revision and the network, or give a folder written by save_pretrained"
            ) from error
        if not self._tokenizer.is_fast:
            raise ConfigError(
                f"the tokenizer of the reward model {name!r} has no tokenizer.json, without which a policy's text cannot be kept "
                "apart from control tokens: convert it, or use another model"
            )
        self._spelling = Spelling(self._tokenizer)
        self._source = chat_template or self._tokenizer.chat_template or PLAIN_FORM
        self._edges = _added_ids(self._tokenizer) if self._source == PLAIN_FORM else ([], [])
        probes = [{"role": role, "content": f"{PROBE}{role}"} for role in ("user", "assistant")]
        if self.ids(probes) is None:
            raise ConfigError(
                f"the chat template of the reward model {name!r} does not show the texts of a user and an assistant: give "
                "another one as chat_template"
            )

    @property
    def max_tokens(self) -> int | None:
        """The tokenizer's limit, None if it has none."""
        limit = int(self._tokenizer.model_max_length)
        return limit if limit < NO_LIMIT else None

    def ids(self, messages: Sequence[Message]) -> list[int] | None:
        """The ids of a conversation; None if the template raises an error or leaves out the text of a message."""
        cut = self._spelling.texts(messages)
        for form in (cut, _without_system(cut)):
            text = self._rendered(form)
            if text is not None and all(m["content"].strip() in self._spelling.joined(text) for m in messages):
                first, last = self._edges
                return [*first, *self._spelling.encode(text), *last] or None
        return None

    def _rendered(self, messages: list[Message]) -> str | None:
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._source,
                add_generation_prompt=False,
                tokenize=False,
                strftime_now=FIXED_DATE.strftime,
            )
        except Exception:  # a template may raise anything on roles and texts that it does not expect
            return None
        return str(text)


def _without_system(messages: list[Message]) -> list[Message]:
    r"""Messages with the system text at the start of the first user message.

    >>> _without_system([{"role": "system", "content": "Add."}, {"role": "user", "content": "3+4?"}])
    [{'role': 'user', 'content': 'Add.\n\n3+4?'}]
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None or messages[0]["role"] != "system":
        return messages
    question = {**messages[first], "content": f"{messages[0]['content']}\n\n{messages[first]['content']}"}
    return [*messages[1:first], question, *messages[first + 1 :]]


def _added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before and after a text."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    start = starts[0] if starts else len(whole)
    return whole[:start], whole[start + len(plain) :]


def words_of(error: Exception) -> str:
    r"""The kind and the text of an error of a library, in one line.

    >>> words_of(OSError("no\n  file"))
    'OSError: no file'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
