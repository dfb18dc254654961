"""Environments that ask for the policy's turns themselves, instead of answering each turn."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.tools.spec import ToolSpec
from fuchsia_pl.types import Message, Rollout

BRANCHES = "branches"  # counter of rows that a rewritten history began


class RefusedTurnError(RuntimeError):
    """The policy cannot write the requested turn. The message states the reason, the value and what is allowed.

    Args:
        message: The reason.
        code: A name of the reason for programs.
        is_limit: Whether tokens, turns or rows of the rollout have run out.
    """

    def __init__(self, message: str, code: str, is_limit: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_limit = is_limit


@dataclass(frozen=True)
class TurnRequest:
    """A conversation that the policy is to continue with one turn.

    Attributes:
        messages: The whole conversation. Calls in the assistant's messages are in `tool_calls`, in OpenAI's form, with the
            arguments as a mapping.
        tools: Tools that the policy may call.
        stop: Strings after which the turn ends.
        max_tokens: Most tokens of the turn, None for as many as the rollout has left.

    >>> TurnRequest(({"role": "user", "content": "3 plus 4?"},)).max_tokens is None
    True
    """

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None


@dataclass(frozen=True)
class WrittenTurn:
    """A turn that the policy wrote for a request.

    Attributes:
        message: The assistant's message: the answer without thinking, and the calls that could be read, each with an id.
        is_cut: Whether the turn ended for lack of tokens.
        num_prompt_tokens: Tokens before the turn.
        num_tokens: Tokens of the turn.

    >>> WrittenTurn({"role": "assistant", "content": "7"}, is_cut=False, num_prompt_tokens=12, num_tokens=2).message["content"]
    '7'
    """

    message: Message
    is_cut: bool
    num_prompt_tokens: int
    num_tokens: int


class TurnSource(ABC):
    """Writes turns of one rollout. Requests are answered one after the other, in the order in which they arrive."""

    @property
    @abstractmethod
    def ran_out(self) -> bool:
        """Whether the newest request met a limit of the rollout: tokens, turns or rows."""

    @abstractmethod
    async def turn(self, request: TurnRequest) -> WrittenTurn:
        """Samples a turn and adds it to the rollout.

        Raises:
            RefusedTurnError: The conversation cannot be rendered, or a limit is reached. The rollout is unchanged.
        """


class SelfDrivenEnvironment(Environment):
    """An environment whose interaction is code that asks for turns, such as an agent.

    Override `run_rollout`; `step_rollout` is not called. A rollout may have `max_steps` turns, and up to `max_rows` rows, see
    `Rollout.branch`.
    """

    @abstractmethod
    async def run_rollout(self, rollout: Rollout, policy: TurnSource) -> None:
        """Runs one interaction and calls `rollout.finish` at its end.

        Args:
            rollout: The rollout.
            policy: Writes the turns.
        """

    @property
    @abstractmethod
    def rollout_timeout_s(self) -> float:
        """Time limit in seconds of one call of `run_rollout`."""

    @property
    def max_turns(self) -> int:
        """Most turns of a rollout; by default `max_steps`, for which a run is planned."""
        return self.max_steps

    def counter_names(self) -> list[str]:
        """Adds the counter of rewritten histories."""
        return [*super().counter_names(), BRANCHES]

    def step_rollout(self, rollout: Rollout) -> None:
        """Is not called."""
        raise AssertionError("a SelfDrivenEnvironment asks for turns in run_rollout")
