"""The requests of one rollout's agent: its key, its limits, and what ends it."""

import asyncio
import secrets
from collections import Counter
from contextlib import suppress
from contextvars import copy_context
from datetime import UTC, datetime

from fuchsia_pl.envs.self_driven import RefusedTurnError, TurnSource, WrittenTurn
from fuchsia_pl.gateway.chat_api import ApiError, ChatRequest, read_request

REQUESTS, REFUSED = "agent_requests", "agent_refused"  # counters
MAX_REFUSED = 100  # answers with an error, after which an agent is ended
MAX_WAITING = 64  # requests that wait for their turns at the same time
CLOSE_TIMEOUT_S = 10.0


class FloodError(RuntimeError):
    """An agent sent far more requests than can be answered."""


class Session:
    """The endpoint of one rollout.

    Args:
        policy: Writes the turns.
        temperature: The rollout's sampling temperature.
        counts: Counters of the rollout.

    Attributes:
        key: The API key, which no other rollout has.
        failed: Done with an error when the agent must be ended.
    """

    def __init__(self, policy: TurnSource, temperature: float, counts: Counter[str]) -> None:
        self.key = secrets.token_urlsafe(24)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._policy = policy
        self._temperature = temperature
        self._counts = counts
        self._context = copy_context()  # that of the rollout: handlers of requests have the server's
        self._turns: set[asyncio.Task[WrittenTurn]] = set()
        self._is_closed = False
        self._number = 0

    async def answer(self, raw: bytes) -> tuple[ChatRequest, WrittenTurn, str, int]:
        """Answers the body of a request.

        Returns:
            The request, the turn, the id of the answer, and the seconds since 1970.

        Raises:
            ApiError: The request is refused, or the rollout has ended.
        """
        self._counts[REQUESTS] += 1
        try:
            asked = read_request(raw, self._temperature)
            written = await self._turn(asked)
        except ApiError:
            self.count_refused()
            raise
        self._number += 1
        return asked, written, f"chatcmpl-{self._number}", int(datetime.now(UTC).timestamp())

    def count_refused(self) -> None:
        """Counts an answer with an error. Too many of them end the agent."""
        self._counts[REFUSED] += 1
        if self._counts[REFUSED] > MAX_REFUSED:
            self._fail(FloodError(f"it sent more than {MAX_REFUSED} requests that were refused"))

    async def close(self) -> None:
        """Refuses further requests and cancels those that wait."""
        self._is_closed = True
        if not self.failed.cancel():
            self.failed.exception()  # asyncio would log an exception that nothing awaited
        for task in self._turns:
            task.cancel()
        if self._turns:
            await asyncio.wait(self._turns, timeout=CLOSE_TIMEOUT_S)

    async def _turn(self, asked: ChatRequest) -> WrittenTurn:
        if self._is_closed:
            raise _ended()
        if len(self._turns) >= MAX_WAITING:
            raise ApiError(429, "too_many_requests", f"{MAX_WAITING} requests of this rollout wait for their answers")
        # A task of its own: a client that is gone cancels the handler, and the turn is still added to the rollout as a whole.
        task = asyncio.get_running_loop().create_task(self._policy.turn(asked.turn), context=self._context)
        self._turns.add(task)
        task.add_done_callback(self._settle)
        try:
            return await asyncio.shield(task)
        except RefusedTurnError as error:
            raise ApiError(400, error.code, str(error)) from error
        except asyncio.CancelledError:
            if self._is_closed:
                raise _ended() from None
            raise
        except Exception as error:
            raise ApiError(500, "engine_failed", "the engine failed, and the run ends") from error

    def _settle(self, task: "asyncio.Task[WrittenTurn]") -> None:
        """Ends the agent if the engine failed, also where no client waits for the turn."""
        self._turns.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception) and not isinstance(error, RefusedTurnError):
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with suppress(asyncio.InvalidStateError):
            self.failed.set_exception(error)


def _ended() -> ApiError:
    return ApiError(400, "rollout_ended", "the rollout of this key has ended")
