"""A conversation with a policy in a terminal: streams answers, calls tools, compares with the base model."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from fuchsia_pl.callbacks.console_text import visible
from fuchsia_pl.envs import SingleTurnEnvironment
from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.thinking import ends_in_thinking
from fuchsia_pl.envs.tool_environment import ToolEnvironment
from fuchsia_pl.loop import LoopThread
from fuchsia_pl.policy.local_engine import LocalEngine
from fuchsia_pl.rollouts.calls import close
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw, PromptTooLongError
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.types import ConfigError, Message, Rollout, RolloutStatus

HELP = """/base           answer the last question again without the adapter; the conversation is not changed
/system TEXT    begin a new conversation with this system message; without TEXT, with none
/reset          begin a new conversation
/help           this list
/quit           end, like Ctrl-D; Ctrl-C ends an answer"""
CLOSE_TIMEOUT_S = 30.0
DEFAULT_MAX_LENGTH = 4096  # of a model whose config states no limit


@dataclass(frozen=True)
class ChatSettings:
    """Settings of a conversation.

    Attributes:
        temperature: Divisor of the logits; 0 is greedy.
        max_tokens: Most tokens of an answer, over all its tool calls.
        seed: Seed of the first answer. Each further answer adds 1.

    >>> ChatSettings().temperature
    0.7
    """

    temperature: float = 0.7
    max_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.temperature < 0:
            raise ConfigError(f"--temperature must be 0 or more, got {self.temperature}; 0 is greedy")
        if self.max_tokens < 1:
            raise ConfigError(f"--max_tokens must be 1 or more, got {self.max_tokens}")


class ConversationEnvironment(ToolEnvironment):
    """The tools of another environment in a conversation. The item has the messages so far."""

    def __init__(self, other: ToolEnvironment) -> None:
        super().__init__()
        self.servers, self.functions = other.servers, other.functions
        self.function_timeout_s, self.max_calls_per_turn = other.function_timeout_s, other.max_calls_per_turn
        self.max_steps = other.max_steps


def conversation_environment(of_config: Environment | None) -> Environment:
    """The environment of a conversation: the tools and the marks of thinking of a config's environment, without its task."""
    if of_config is None:
        return SingleTurnEnvironment()
    made: Environment = (
        ConversationEnvironment(of_config) if isinstance(of_config, ToolEnvironment) else SingleTurnEnvironment()
    )
    made.thinking_marks, made.stop = of_config.thinking_marks, of_config.stop
    made.timeout_s, made.max_response_chars = of_config.timeout_s, of_config.max_response_chars
    return made


@dataclass
class Session:
    """A conversation.

    Attributes:
        engine: Generates the answers.
        chat: Tokenizer and chat template of the model.
        environment: Tools and marks of thinking, see `conversation_environment`.
        settings: How answers are sampled.
        console: Where they are printed.
        messages: The conversation so far.
    """

    engine: LocalEngine
    chat: Chat
    environment: Environment
    settings: ChatSettings
    console: Console
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Makes the collector, which runs an answer with its tool calls as it runs a rollout."""
        limit = self.engine.max_length or DEFAULT_MAX_LENGTH
        if self.settings.max_tokens >= limit:
            raise ConfigError(
                f"--max_tokens must be below the {limit} tokens of the model's context, got {self.settings.max_tokens}"
            )
        config = SamplingConfig(max_completion_tokens=self.settings.max_tokens, max_length=limit)
        self._collector = Collector(self.engine, self.environment, self.chat, config)
        self._loop = LoopThread("chat")
        self._num_answers = 0
        self._question: list[Message] = []
        self._printed = _Printed(self.chat, self.environment, self.console)
        self.engine.on_token = self._printed.add

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Starts the tools, and stops them when the `with` block ends.

        Raises:
            ConfigError: The tools do not work.
            ToolServerError: A tool server does not start.
        """
        try:
            self._loop.run(self._collector.prepare(), None)  # bounded by the environment's own limit
            yield
        finally:
            try:
                self._loop.run(close(self.environment, CLOSE_TIMEOUT_S), 2 * CLOSE_TIMEOUT_S)
            finally:
                self._loop.stop(CLOSE_TIMEOUT_S)

    def take(self, line: str) -> bool:
        """Answers a line of the user, or runs its command; returns whether the conversation continues."""
        command, _, rest = line.strip().partition(" ")
        actions: dict[str, Callable[[], Any]] = {
            "/base": self._answer_as_base,
            "/help": lambda: self._tell(HELP),
            "/reset": lambda: self.reset(self._system),
            "/system": lambda: self.reset(rest.strip()),
        }
        if command == "/quit":
            return False
        if command in actions:
            actions[command]()
        elif command.startswith("/"):
            self._tell(f"{command} is no command:\n{HELP}")
        elif command:
            self._answer(line.strip())
        return True

    def reset(self, system: str) -> None:
        """Begins a new conversation with a system message, or without one if it is empty."""
        self.messages = [{"role": "system", "content": system}] if system else []
        self._question = []
        self._tell("a new conversation" + (" with a system message" if system else ""))

    @property
    def _system(self) -> str:
        first = self.messages[:1]
        return str(first[0]["content"]) if first and first[0]["role"] == "system" else ""

    def _answer(self, question: str) -> None:
        asked: list[Message] = [*self.messages, {"role": "user", "content": question}]
        rollout = self._run(asked)
        if rollout is not None:
            self._question, self.messages = asked, list(rollout.messages)

    def _answer_as_base(self) -> None:
        if not self.engine.has_adapter:
            self._tell("there is no adapter: every answer is the base model's")
        elif not self._question:
            self._tell("there is no question yet")
        else:
            self.engine.uses_adapter = False
            try:
                self._tell("base model:")
                self._run(self._question)
            finally:
                self.engine.uses_adapter = True

    def _run(self, messages: list[Message]) -> Rollout | None:
        """Samples and prints an answer; None if there was no room for one."""
        # `/base` uses the seed of the answer that it is compared with.
        seed = self.settings.seed + self._num_answers - (not self.engine.uses_adapter)
        draw = Draw([{"prompt": messages}], [0], 1, self.settings.temperature, (seed, "chat"))
        self._printed.begin()
        try:
            with _interrupts(self.engine):
                ((rollout,),) = self._loop.run(self._collector.collect(draw), None)  # bounded by max_tokens
        except PromptTooLongError:
            self._tell(
                f"the conversation and an answer of {self.settings.max_tokens} tokens exceed the model's context: /reset begins "
                "a new one"
            )
            return None
        except ConfigError as error:  # the template cannot render this conversation
            self._tell(str(error))
            return None
        self._printed.end()
        self._num_answers += self.engine.uses_adapter
        if rollout.status is RolloutStatus.TRUNCATED:
            self._tell("stopped" if self.engine.is_stopped else f"cut after --max_tokens {self.settings.max_tokens}")
        elif rollout.status is not RolloutStatus.COMPLETED:
            self._tell(f"ended with {rollout.status}")
        return rollout

    def _tell(self, text: str) -> None:
        self.console.print(Text(text, style="dim"), soft_wrap=True)


class _Printed:
    """Prints an answer while it is sampled. Thinking is dim; each turn after a tool call begins on a new line."""

    def __init__(self, chat: Chat, environment: Environment, console: Console) -> None:
        self._chat, self._marks, self._console = chat, environment.thinking_marks, console
        self.begin()

    def begin(self) -> None:
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token_id: int) -> None:
        """Prints the text that a new id completes. Ids of an incomplete character wait for the next one."""
        self._ids.append(token_id)
        text = self._chat.text(self._ids)
        if not text.endswith("�"):
            self._show(text)
        if token_id in self._chat.stop_token_ids:
            self.end()
            self.begin()

    def end(self) -> None:
        """Prints the rest and a line end."""
        if self._ids:
            self._show(self._chat.text(self._ids))
            self._console.print()
        self.begin()

    def _show(self, text: str) -> None:
        new = text[len(self._shown) :]
        self._shown = text
        if new:
            style = "dim" if ends_in_thinking(self._chat.raw_text(self._ids), self._marks) else ""
            self._console.print(Text(visible(new), style=style), end="", soft_wrap=True)


@contextlib.contextmanager
def _interrupts(engine: LocalEngine) -> Iterator[None]:
    """Inside the `with` block, Ctrl-C ends the answer instead of the program."""

    def stop(*_: object) -> None:
        engine.is_stopped = True

    before = signal.signal(signal.SIGINT, stop)
    # Python also writes signals to this descriptor, where a thread would begin the orderly end of the program.
    descriptor = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGINT, before)
