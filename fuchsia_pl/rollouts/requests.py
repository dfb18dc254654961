"""Turns for an environment that asks for them with whole conversations.

A conversation that continues what was sampled extends the ids of the row. One that was rewritten begins a new row. Ids that were
sampled are never made from text again: a new row begins with the ids of the longest known beginning of its conversation.
"""

import asyncio
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fuchsia_pl.envs.self_driven import (
    BRANCHES,
    RefusedTurnError,
    SelfDrivenEnvironment,
    TurnRequest,
    TurnSource,
    WrittenTurn,
)
from fuchsia_pl.envs.tools.convention import ToolConvention
from fuchsia_pl.envs.tools.spec import ToolSpec
from fuchsia_pl.envs.user_code import reason
from fuchsia_pl.rollouts.calls import EnvironmentStepError, call_method
from fuchsia_pl.types import Message, Rollout, Turn

if TYPE_CHECKING:  # the collector imports this module
    from fuchsia_pl.rollouts.collector import Collector, Draw

GRACE_S = 30.0  # beyond an environment's own limit, in which it ends what it started
MAX_CHARS_PER_TOKEN = 64  # no text of that many characters has fewer tokens than there is room for
Known = tuple[str, ...]  # a conversation: its tools and its messages, in a form that can be compared


@dataclass(frozen=True)
class Place:
    """A conversation whose ids are known.

    Attributes:
        known: The conversation.
        token_ids: Its ids.
        prompt: The messages that the row began with, as the template takes them.
        is_answered: Whether it ends with a turn of the policy, and not with the header of one.

    >>> Place(("tools", "question"), (11, 12), (), is_answered=False).num_messages
    1
    """

    known: Known
    token_ids: tuple[int, ...]
    prompt: tuple[Message, ...]
    is_answered: bool

    @property
    def num_messages(self) -> int:
        """Number of its messages."""
        return len(self.known) - 1


class RequestedTurns(TurnSource):
    """Writes the turns of one rollout.

    Args:
        collector: Samples.
        draw: How to sample.
        rollout: The rollout.

    Attributes:
        failure: An error of the engine, which ends the run.
    """

    def __init__(self, collector: "Collector", draw: "Draw", rollout: Rollout) -> None:
        self.failure: Exception | None = None
        self._collector = collector
        self._draw = draw
        self._rollout = rollout
        self._lock = asyncio.Lock()  # it wakes those that wait in the order in which they came
        self._views: dict[tuple[str, tuple[str, ...]], Collector] = {}
        self._places: list[Place] = []
        self._num_turns = 0
        self._ran_out = False

    @property
    def ran_out(self) -> bool:
        """Whether the newest request met a limit of the rollout; see `TurnSource`."""
        return self._ran_out

    async def turn(self, request: TurnRequest) -> WrittenTurn:
        """Samples a turn and adds it to the rollout; see `TurnSource`."""
        async with self._lock:
            try:
                view, asked, extended = self._prepared(request)
                room = self._room(len(asked.token_ids))
            except RefusedTurnError as error:
                self._ran_out = error.is_limit
                raise
            except Exception as error:  # a template or a tokenizer may raise anything on foreign messages
                raise RefusedTurnError(
                    f"the messages cannot be rendered: {reason(error)}", "invalid_messages"
                ) from error
            try:
                return await self._written(request, view, asked, extended, room)
            except Exception as error:
                self.failure = error
                raise

    def _prepared(self, request: TurnRequest) -> "tuple[Collector, Place, Place | None]":
        """A collector for the request, the place at the header of the new turn, and the row's end if it is extended."""
        self._check_size(request)
        view, found = self._view(request), self._longest_known(request)
        extended = found if found is not None and found is self._places[-1] else None
        self._check_limits(extended is not None)
        return view, self._asked(request, found, view.environment.tool_convention), extended

    async def _written(
        self, request: TurnRequest, view: "Collector", asked: Place, extended: Place | None, room: int
    ) -> WrittenTurn:
        """Samples a turn of at most `room` tokens. The rollout changes after that: the request may be cancelled."""
        rollout = self._rollout
        limit = room if request.max_tokens is None else min(room, request.max_tokens)
        prompted = replace(rollout, token_ids=list(asked.token_ids))
        turn = await view.sample_turn(self._draw, prompted, self._num_turns, limit)
        self._append(request, asked, extended)
        rollout.append(turn)
        message = answer_message(turn, view.environment.tool_convention, request, self._num_turns)
        answered = Place((*asked.known, _key(message)), tuple(rollout.token_ids), asked.prompt, is_answered=True)
        self._places += [asked, answered]
        self._num_turns += 1
        is_cut = turn.completion.finish_reason == "length"
        self._ran_out = is_cut and (request.max_tokens is None or room < request.max_tokens)
        return WrittenTurn(message, is_cut, len(asked.token_ids), len(turn.completion.token_ids))

    def _view(self, request: TurnRequest) -> "Collector":
        """A collector with the tools and the stop strings of a request."""
        key = (_tools_key(request), request.stop)
        if key not in self._views:
            collector = self._collector
            environment = copy.copy(collector.environment)
            environment.tools, environment.tool_convention = (
                without_schemas(request.tools),
                collector.chat.convention(request.tools),
            )
            environment.stop = [*environment.stop, *request.stop]
            self._views[key] = type(collector)(collector.engine, environment, collector.chat, collector.config)
        return self._views[key]

    def _check_size(self, request: TurnRequest) -> None:
        """Refuses a conversation that cannot fit, before it is rendered, which takes seconds per MB for all rollouts."""
        max_length = self._collector.config.max_length
        if sum(map(len, _known(request))) > MAX_CHARS_PER_TOKEN * max_length:
            raise RefusedTurnError(
                f"the conversation has more than {MAX_CHARS_PER_TOKEN * max_length} characters, and a row has {max_length} "
                "tokens (data.sampling.max_length)",
                "context_length_exceeded",
                True,
            )

    def _check_limits(self, extends: bool) -> None:
        """Refuses a turn or a row beyond the environment's limits."""
        environment, rollout = self._collector.environment, self._rollout
        assert isinstance(environment, SelfDrivenEnvironment)
        if self._num_turns >= environment.max_turns:
            raise RefusedTurnError(f"the rollout has had its {environment.max_turns} turns", "turn_limit", True)
        if not extends and rollout.turns and len(rollout.rows) >= environment.max_rows:
            raise RefusedTurnError(
                f"the history does not continue the last answer, and the rollout has had its {environment.max_rows} rows: append "
                "messages to those so far, or raise the limit of rows",
                "row_limit",
                True,
            )

    def _room(self, num_tokens: int) -> int:
        """Tokens that a turn after `num_tokens` ids may have."""
        config = self._collector.config
        left, room = config.max_completion_tokens - self._rollout.num_sampled_tokens, config.max_length - num_tokens
        if left < 1:
            most = f"{config.max_completion_tokens} tokens (data.sampling.max_completion_tokens)"
            raise RefusedTurnError(f"the policy has written its {most}", "token_limit", True)
        if room < 1:
            allowed = f"at most {config.max_length - 1} may come before a turn (data.sampling.max_length)"
            raise RefusedTurnError(
                f"the conversation has {num_tokens} tokens, {allowed}", "context_length_exceeded", True
            )
        return min(left, room)

    def _longest_known(self, request: TurnRequest) -> Place | None:
        """The place with the longest beginning of a conversation, the newest of several.

        A place at a header must be the whole conversation. After an answer, only messages of other roles may follow: text that
        the policy did not write must not look like one of its turns within a row.
        """
        whole, best = _known(request), None
        for place in self._places:
            follows = request.messages[place.num_messages :]
            if place.known != whole[: len(place.known)] or bool(follows) != place.is_answered:
                continue
            if any(message["role"] == "assistant" for message in follows):
                continue
            if best is None or place.num_messages >= best.num_messages:
                best = place
        return best

    def _asked(self, request: TurnRequest, found: Place | None, convention: ToolConvention) -> Place:
        """The place at the header of the new turn."""
        chat, known = self._collector.chat, _known(request)
        if found is None:
            messages = [rendered(message, convention) for message in request.messages]
            ids = chat.render(messages, request.tools, convention)
            return Place(known, tuple(ids), tuple(messages), is_answered=False)
        if not found.is_answered:
            return found
        responses = [rendered(message, convention) for message in request.messages[found.num_messages :]]
        tools, last_id = request.tools if convention.is_native else (), found.token_ids[-1]
        ids = chat.bridge(list(found.prompt), responses, last_id, tools, checks_text=True)
        return Place(known, (*found.token_ids, *ids), found.prompt, is_answered=False)

    def _append(self, request: TurnRequest, asked: Place, extended: Place | None) -> None:
        """Adds the ids in front of the new turn: to the open row, or as a new row if none is extended."""
        rollout = self._rollout
        if extended is not None:
            rollout.append_environment(list(asked.token_ids[len(extended.token_ids) :]))
            rollout.messages += request.messages[extended.num_messages :]
            return
        if rollout.turns:
            rollout.counts[BRANCHES] += 1
        ids = list(asked.token_ids)
        rollout.branch(ids, self._collector.chat.raw_text(ids), request.messages)


async def hand_over(collector: "Collector", draw: "Draw", rollout: Rollout) -> None:
    """Runs an environment that asks for turns itself.

    Raises:
        EnvironmentStepError: It raised, took longer than its limit, or did not finish the rollout.
        Exception: The engine failed.
    """
    environment = collector.environment
    assert isinstance(environment, SelfDrivenEnvironment)
    turns = RequestedTurns(collector, draw, rollout)

    async def run_rollout(of: Rollout) -> None:
        await environment.run_rollout(of, turns)

    try:
        await call_method(environment, run_rollout, rollout, environment.rollout_timeout_s + GRACE_S)
    except EnvironmentStepError:
        if turns.failure is None:
            raise
    if turns.failure is not None:
        raise turns.failure
    if rollout.status is None:
        raise EnvironmentStepError(
            f"{type(environment).__name__}.run_rollout on item {rollout.item_index} did not call rollout.finish()"
        )


def rendered(message: Message, convention: ToolConvention) -> Message:
    """A message as a chat template takes it. Where the template has no format for calls, they are text.

    >>> from fuchsia_pl.envs.tools.convention import PLAIN
    >>> rendered({"role": "tool", "content": "3", "tool_call_id": "call_0_0"}, PLAIN)
    {'role': 'user', 'content': '<tool_response>3</tool_response>'}
    """
    if message["role"] == "tool":
        return {"role": convention.role, "content": convention.result(message["content"])}
    calls: Any = message.get("tool_calls")
    if calls and not convention.is_native:
        written = [convention.call(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        return {"role": message["role"], "content": "".join([message["content"], *written])}
    return message


def answer_message(turn: Turn, convention: ToolConvention, request: TurnRequest, number: int) -> Message:
    """The assistant's message for the program that asked: the answer without thinking, and its calls.

    The text ends before the first stop string of the request. With calls, it is the text in front of them. A call that cannot be
    read stays text; beside others that can be read, it is left out.

    Args:
        turn: The turn.
        convention: Format of the calls.
        request: The request.
        number: Number of the turn, for the ids of its calls.
    """
    found = convention.read(turn.raw_answer, without_schemas(request.tools)).calls if request.tools else ()
    calls: Any = [
        {
            "id": f"call_{number}_{place}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for place, call in enumerate(found)
        if call.error is None
    ]
    if calls:
        before = turn.raw_answer.partition(convention.opening)[0] if convention.opening else ""
        return {"role": "assistant", "content": before.strip(), "tool_calls": calls}
    content = turn.answer
    for stop in request.stop:
        content = content.partition(stop)[0]
    return {"role": "assistant", "content": content}


def without_schemas(tools: Sequence[ToolSpec]) -> list[ToolSpec]:
    """The tools by name, as calls are read with them.

    A schema of the program that asks may take for ever to follow or refer to other machines; only the template shows it.

    >>> without_schemas([ToolSpec("add", "Adds.", {"type": "object"})])
    [ToolSpec(name='add', description='Adds.', parameters={})]
    """
    return [replace(tool, parameters={}) for tool in tools]


def _known(request: TurnRequest) -> Known:
    return (_tools_key(request), *(_key(message) for message in request.messages))


def _tools_key(request: TurnRequest) -> str:
    return json.dumps([tool.for_template() for tool in request.tools], sort_keys=True)


def _key(message: Message) -> str:
    """The part of a message that the policy reads. Ids of calls, and white space in their JSON, may differ."""
    calls: Any = message.get("tool_calls") or ()
    functions = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return json.dumps([message["role"], message["content"], functions], sort_keys=True)
