"""Hands turns over between a taskset's coroutine, which asks for them, and the collector, which samples them."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fuchsia_pl.envs import Message, ToolCall, ToolResult


@dataclass(frozen=True)
class Reply:
    """A turn of the policy, as a taskset sees it.

    Attributes:
        text: What the policy wrote, without thinking and tool calls.
        thinking: Its thinking; None if there is none.
        calls: Tool calls that were made, in order.
        results: Their results.
        is_cut: Whether the turn ended because tokens ran out.
        num_prompt_tokens: Number of tokens before the turn.
        num_completion_tokens: Number of tokens of the turn.

    >>> Reply("7", None, is_cut=False, num_prompt_tokens=2, num_completion_tokens=1).results
    ()
    """

    text: str
    thinking: str | None
    is_cut: bool
    num_prompt_tokens: int
    num_completion_tokens: int
    calls: Sequence[ToolCall] = ()
    results: Sequence[ToolResult] = ()


class Exchange:
    """One question at a time: messages for the policy, and its reply. Both sides run in the event loop that creates it.

    Attributes:
        stopped_by: Name of the limit after which there are no more turns; None while there are.
        max_chars: Largest length of a message for the policy after its first turn.
    """

    def __init__(self, max_chars: int) -> None:
        self.stopped_by: str | None = None
        self.max_chars = max_chars
        self._question: asyncio.Future[list[Message]] = asyncio.get_running_loop().create_future()
        self._reply: asyncio.Future[Reply | None] | None = None
        self._is_abandoned = False

    async def ask(self, messages: list[Message]) -> Reply | None:
        """Asks the policy for its next turn. The taskset's side.

        Args:
            messages: What it reads first. Empty after tool calls: it has their results.

        Returns:
            The turn; None if there are no more turns.

        Raises:
            RuntimeError: Another question waits for its reply, or was given up.
        """
        if self.stopped_by is not None:
            return None
        if self._reply is not None or self._is_abandoned:
            what = (
                "gave up the wait for a turn (by a time limit of its own?)"
                if self._is_abandoned
                else "waits for a turn"
            )
            raise RuntimeError(f"the environment asks for a turn, but {what} already: a rollout has one turn at a time")
        self._reply = asyncio.get_running_loop().create_future()
        self._question.set_result(messages)
        try:
            return await self._reply
        except asyncio.CancelledError:
            self._is_abandoned = True
            raise
        finally:
            self._reply = None

    async def question(self, run: "asyncio.Task[None]") -> list[Message] | None:
        """Waits for the next question. The collector's side; its caller bounds the wait.

        Args:
            run: The taskset's coroutine. Its error is raised.

        Returns:
            The messages; None if the coroutine ended without a question.
        """
        either: list[asyncio.Future[Any]] = [self._question, run]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if run.done():
            run.result()
            return None
        messages = self._question.result()
        self._question = asyncio.get_running_loop().create_future()
        return messages

    def answer(self, reply: Reply | None) -> None:
        """Answers the last question. The collector's side.

        Args:
            reply: The turn; None if there are no more turns.

        Raises:
            RuntimeError: Nobody waits for it.
        """
        if self._reply is None or self._reply.done():
            raise RuntimeError("the environment asked for a turn and no longer waits for it (a time limit of its own?)")
        self._reply.set_result(reply)
