"""A model's chat template, rendered with the start time of the run."""

from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from fuchsia_pl.envs.tools.spec import ToolSpec
from fuchsia_pl.rollouts.probes import QUESTION, TEMPLATE_ERRORS, TURN, with_call_id
from fuchsia_pl.types import PLAIN_TEXT, ConfigError, Message

# Template of a model without one: the texts of the messages; the policy continues the last one.
BLANK_LINES = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"


class Template:
    """Renders conversations to text.

    Args:
        tokenizer: The model's tokenizer.
        source: The template, "none" for messages joined by blank lines, None for the tokenizer's template.
        started_at: Current time for the template. Some templates write the date into every prompt.

    Attributes:
        has_read_date: Whether a rendered text may depend on the date.

    Raises:
        ConfigError: There is no template, or it omits the text of messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, source: str | None, started_at: datetime) -> None:
        if source is None and not tokenizer.chat_template:
            raise ConfigError(
                "the model's tokenizer has no chat template, so a conversation cannot become ids: set "
                'model.policy.chat_template to a file, a template, or "none" (a base model continues the messages\' text)'
            )
        self._tokenizer = tokenizer
        self.is_plain = source == PLAIN_TEXT
        self._source = BLANK_LINES if self.is_plain else source
        self.started_at = started_at
        # Some templates write the date only with tools or a system text. So rendered texts are observed instead of a probe.
        self.has_read_date = False
        self._checked: set[tuple[str, ...]] = set()
        self.check_roles(["user"])

    def __call__(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, tools: Sequence[ToolSpec]
    ) -> str:
        """The text of a conversation.

        Args:
            messages: The conversation.
            add_generation_prompt: Whether the text ends with the header of the policy's turn.
            tools: Tools that the template lists.
        """
        text = self._tokenizer.apply_chat_template(
            [with_call_id(message) for message in messages],
            tools=[tool.for_template() for tool in tools] or None,
            chat_template=self._source,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            strftime_now=self._now,  # instead of the current time
        )
        assert isinstance(text, str)
        return text

    @cached_property
    def _shows_system(self) -> bool:
        try:
            return TURN in self([{"role": "system", "content": TURN}, QUESTION], True, ())
        except TEMPLATE_ERRORS:
            return False

    def fitted(self, messages: list[Message]) -> list[Message]:
        """Messages. If the template has no system role, its text is moved to the start of the first user message."""
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if not messages or messages[0]["role"] != "system" or first is None or self._shows_system:
            return messages
        question = {**messages[first], "content": f"{messages[0]['content']}\n\n{messages[first]['content']}"}
        return [*messages[1:first], question, *messages[first + 1 :]]

    def check_roles(self, roles: Sequence[str]) -> None:
        """Checks that the template shows the text of every message in a conversation of these roles.

        A template that cannot render these roles at all raises its own error when it is used.

        Raises:
            ConfigError: It omits the text of a role. The message names the role.
        """
        if tuple(roles) in self._checked:
            return
        messages = [{"role": role, "content": f"{TURN}{i}x"} for i, role in enumerate(roles)]
        try:
            text = self(messages, True, ())
        except TEMPLATE_ERRORS:
            return
        missing = next((m["role"] for m in messages if m["content"] not in text), None)
        if missing is not None:
            raise ConfigError(
                f"the model's chat template leaves out the text of messages of the role {missing!r}: use another template "
                "(model.policy.chat_template) or another model"
            )
        self._checked.add(tuple(roles))

    def _now(self, form: str) -> str:
        self.has_read_date = True
        return self.started_at.strftime(form)
