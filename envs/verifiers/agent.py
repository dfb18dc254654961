"""The policy in the place of verifiers' agent: the same `run` and `interaction`, without a program, an endpoint or a runtime."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any

import verifiers.v1 as vf
from verifiers.v1 import graph
from verifiers.v1.session import call_hook
from verifiers.v1.state import state_cls
from verifiers.v1.utils.decorators import invoke

from fuchsia_pl.envs import ConfigError
from fuchsia_pl.envs.user_code import contained
from fuchsia_pl.library.verifiers.exchange import Exchange, Reply
from fuchsia_pl.library.verifiers.messages import as_ours, as_read, opening_messages, user_messages, written_messages

MODEL = "policy"


class PolicyAgent:
    """The only agent of an episode.

    Args:
        name: Its name in the environment's config.
        config: Its config.
        exchange: Asks the collector for turns.

    Attributes:
        trainable: Set by `Env.setup`; False is refused.
        interactions: The one interaction, once it is open.
    """

    def __init__(self, name: str, config: vf.AgentConfig, exchange: Exchange) -> None:
        self.name = name
        self.config = config
        self.trainable = True
        self.interactions: list[PolicyInteraction] = []
        self._exchange = exchange

    async def run(
        self,
        task: vf.Task,
        runtime: Any = None,
        tools: Any = None,
        on_trace: Callable[[vf.Trace], None] | None = None,
        collect_artifacts: bool = False,
    ) -> vf.Trace:
        """Runs the policy on the task's prompt until it yields.

        Args:
            task: The task.
            runtime: Must be None.
            tools: Must be empty.
            on_trace: Called with the trace before the first turn.
            collect_artifacts: Must be False.
        """
        if collect_artifacts:
            raise ConfigError("an environment of verifiers collects artifacts, which needs a container")
        async with self.interaction(task, runtime, tools, on_trace) as interaction:
            await interaction.turn()
            if interaction.trace.stop_condition is None:
                interaction.trace.stop("agent_completed")
        return interaction.trace

    @asynccontextmanager
    async def interaction(
        self,
        task: vf.Task,
        runtime: Any = None,
        tools: Any = None,
        on_trace: Callable[[vf.Trace], None] | None = None,
    ) -> "AsyncIterator[PolicyInteraction]":
        """Opens the conversation, whose user is the caller; its end scores it.

        Args:
            task: The task.
            runtime: Must be None.
            tools: Must be empty.
            on_trace: Called with the trace before the first turn.

        Raises:
            ConfigError: It is the second one of an episode, or is given a runtime or tools.
        """
        given = [name for name, value in {"runtime": runtime, "tools": tools}.items() if value]
        if given:
            raise ConfigError(f"an environment of verifiers gives its agent {given}, and there are no runtimes here")
        if self.interactions:
            raise ConfigError(
                "an environment of verifiers runs its agent more than once for a task, but one rollout is one run: use group_size"
            )
        interaction = PolicyInteraction(self, task, self._exchange)
        self.interactions.append(interaction)
        if on_trace is not None:
            on_trace(interaction.trace)
        if type(task).setup is not vf.Task.setup:
            async with _limited(task.data.timeout.setup, "setup"):
                await invoke(task.setup, {"trace": interaction.trace})
        yield interaction
        await interaction.close()  # not after an error: it ends the episode

    def provision(self, task: vf.Task | None = None) -> None:
        """Refuses a runtime.

        Args:
            task: The task.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("an environment of verifiers provisions a runtime, and there are none here")


class PolicyInteraction:
    """A conversation with the policy, turn by turn. `trace` is up to date at any time.

    Args:
        agent: The agent.
        task: The task.
        exchange: Asks the collector for turns.
    """

    def __init__(self, agent: PolicyAgent, task: vf.Task, exchange: Exchange) -> None:
        self.trace: vf.Trace = vf.Trace(
            task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
            state=state_cls(type(task))(),
            agent=vf.AgentInfo(config=agent.config, name=agent.name),
        )
        self.failure: Exception | None = None
        self._task = task
        self._max_turns = agent.config.max_turns
        self._exchange = exchange
        self._conversation: list[vf.Message] = []
        self._stops = task.hooks("stop")
        self._lock = asyncio.Lock()
        self._is_closed = self._is_over = False

    async def turn(self, message: str | vf.Messages | None = None) -> vf.Segment:
        """Sends one user turn and returns what the policy wrote, with its tool calls and their results.

        Args:
            message: A text or user messages; None for the first reply to a task's own prompt.

        Raises:
            RuntimeError: The conversation is over.
            ValueError: The first turn of a task with a prompt takes no message, and every other turn takes one.
        """
        async with self._lock:
            if self._is_closed or self._is_over:
                raise RuntimeError("the conversation is over: read interaction.trace")
            new = self._new_messages(message)
            num_turns, num_nodes = self.trace.num_turns, len(self.trace.nodes)
            await self._segment(new)
            if self.trace.num_turns == num_turns:
                self._is_over = True
                return vf.Segment(messages=[], terminated=True)
            return vf.Segment(messages=_after_prompt(self.trace.nodes[num_nodes:]))

    async def steer(self, *given: Any, **named: Any) -> dict[str, Any]:
        """Refuses a message in the middle of a turn.

        Args:
            given: Arguments of verifiers' method.
            named: Arguments of verifiers' method.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("an environment of verifiers steers its agent within a turn, which needs a harness program")

    send = steer

    async def close(self) -> vf.Trace:
        """Ends the conversation, and runs the task's `finalize` and its scoring. A second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            if self.trace.stop_condition is None:
                self.trace.stop("user_closed")
            try:
                await self._score()
            except Exception as error:  # as in verifiers: the error is part of the trace, and the environment goes on
                self.trace.record_error(error)
                self.failure = error
            self.trace.is_completed, self.trace.ok = True, self.failure is None
        return self.trace

    def _new_messages(self, message: str | vf.Messages | None) -> list[vf.Message]:
        is_first, data = not self._conversation, self.trace.task.data
        if (message is None) != (is_first and data.prompt is not None):
            raise ValueError(
                "turn() takes no message for the first reply to a task's prompt, and a message for every other turn"
            )
        new = [] if message is None else user_messages(message)
        return opening_messages(data, new) if is_first else list(new)

    async def _segment(self, new: list[vf.Message]) -> None:
        """Asks for turns until one has no tool calls."""
        # The collector cuts long messages for the policy; the trace has what it reads.
        self._conversation += as_read(new, self._exchange.max_chars) if self._conversation else new
        while not await self._is_stopped():
            reply = await self._exchange.ask(as_ours(new))
            if reply is None:
                self.trace.stop(str(self._exchange.stopped_by))
                return
            self._record(reply)
            if reply.is_cut or not reply.results:
                return
            new = []

    async def _is_stopped(self) -> bool:
        """Whether the agent's limit of turns or a `@stop` of the task ends the conversation before the next turn."""
        if self._max_turns is not None and self.trace.num_turns >= self._max_turns:
            self.trace.stop("max_turns")
        for stop in self._stops:
            if self.trace.stop_condition is None and await call_hook(stop, {vf.Trace: self.trace}):
                self.trace.stop(stop.__name__)
        return self.trace.stop_condition is not None

    def _record(self, reply: Reply) -> None:
        message, results = written_messages(reply, self.trace.num_turns)
        reason: Any = "length" if reply.is_cut else "tool_calls" if results else "stop"
        usage = vf.Usage(prompt_tokens=reply.num_prompt_tokens, completion_tokens=reply.num_completion_tokens)
        response = vf.Response(id="", created=0, model=MODEL, message=message, finish_reason=reason, usage=usage)
        node = graph.prepare_turn(self.trace, self._conversation).commit(response)
        self.trace.calls.append(vf.ModelCall(node=node, model=MODEL, finish_reason=reason, usage=usage))
        self._conversation += [message, *results]

    async def _score(self) -> None:
        task, timeout = self._task, self._task.data.timeout
        if type(task).finalize is not vf.Task.finalize:
            async with _limited(timeout.finalize, "finalize"):
                await invoke(task.finalize, {"trace": self.trace})
        async with _limited(timeout.scoring, "scoring"):
            await _guarded(task).score(self.trace)


@asynccontextmanager
async def _limited(seconds: float | None, stage: str) -> AsyncIterator[None]:
    """The task's own limit of a stage."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise RuntimeError(f"the {stage} of a task took longer than its own limit of {seconds:g} s") from error


def _after_prompt(nodes: list[vf.MessageNode]) -> vf.Messages:
    """The messages of a segment: what was sampled, and the results of tools after it."""
    first = next(position for position, node in enumerate(nodes) if node.sampled)
    return [node.message for node in nodes[first:] if node.sampled or isinstance(node.message, vf.ToolMessage)]


def _guarded(task: vf.Task) -> vf.Task:
    """A copy of a task whose rewards and metrics cannot end the event loop: verifiers runs each in a task of its own."""

    def hooks(kind: str) -> list[Callable[..., Any]]:
        return [_contained(function) for function in task.hooks(kind)]

    clone = copy.copy(task)
    vars(clone)["hooks"] = hooks
    return clone


def _contained(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    async def call(*arguments: Any, **named: Any) -> Any:
        return await contained(function(*arguments, **named))

    return call
