"""One task played by `Env.run` of verifiers in a coroutine. The collector supplies the turns."""

import asyncio

import verifiers.v1 as vf

from fuchsia_pl.envs import ConfigError, Message
from fuchsia_pl.envs.base import is_finite_number
from fuchsia_pl.envs.bounded import cancel_bounded
from fuchsia_pl.envs.user_code import contained
from fuchsia_pl.library.verifiers.agent import PolicyAgent
from fuchsia_pl.library.verifiers.exchange import Exchange, Reply


class Play:
    """An episode. Its methods are called in turn, in one event loop.

    Args:
        env: The environment of verifiers.
        task: The task.
        max_chars: Largest length of a message for the policy after its first turn.
    """

    def __init__(self, env: vf.Env, task: vf.Task, max_chars: int) -> None:
        self._env = env
        self._task = task
        self._exchange = Exchange(max_chars)
        self._agents: list[PolicyAgent] = []
        self._run: asyncio.Task[None] | None = None
        self.num_answered = 0

    @property
    def is_truncated(self) -> bool:
        """Whether a limit of tokens or turns ended the conversation, as verifiers defines it."""
        return self._trace().is_truncated

    async def start(self) -> list[Message]:
        """Starts the episode. The caller bounds the wait.

        Returns:
            The messages before the policy's first turn.

        Raises:
            ConfigError: The episode ended without a turn.
        """
        self._run = asyncio.create_task(contained(self._episode()), name=f"{type(self._env).__name__}.run")
        messages = await self._exchange.question(self._run)
        if messages is None:
            raise ConfigError(f"{type(self._env).__name__}.run of verifiers ends without a turn of its agent")
        return messages

    async def go_on(self, reply: Reply) -> list[Message] | None:
        """Hands over a turn. The caller bounds the wait.

        Args:
            reply: The turn.

        Returns:
            The messages before the next turn; None if the episode has ended and is scored.
        """
        assert self._run is not None, "start comes first"
        self.raise_failure()
        self._exchange.answer(reply)
        self.num_answered += 1
        return await self._exchange.question(self._run)

    async def stop(self, limit: str, reply: Reply | None) -> None:
        """Ends the conversation at a limit and waits until the episode is scored. The caller bounds the wait.

        Args:
            limit: Name of the limit.
            reply: The last turn, if it has not been handed over.
        """
        assert self._run is not None, "start comes first"
        if not self._run.done():
            self._exchange.stopped_by = limit
            self._exchange.answer(reply)
            await asyncio.wait([self._run])
        self._run.result()

    async def cancel(self) -> None:
        """Ends the coroutine, also if it does not react to a cancellation within its grace time."""
        if self._run is not None and not self._run.done():
            await cancel_bounded(self._run, f"{type(self._env).__name__}.run")

    def raise_failure(self) -> None:
        """Raises the error of an episode that failed although a turn was asked for."""
        if self._run is not None and self._run.done():
            self._run.result()

    def rewards(self) -> dict[str, tuple[float, float]]:
        """Score and weight of each reward of a finished episode, by name.

        Raises:
            ValueError: One is no finite number.
        """
        recorded = self._trace().rewards.items()
        return {
            name: (_finite(name, one.score), _finite(name, one.weight)) for name, one in recorded if one is not None
        }

    def metrics(self) -> dict[str, float]:
        """The metrics of a finished episode, by name.

        Raises:
            ValueError: One is no finite number.
        """
        recorded = self._trace().metrics.items()
        return {name: _finite(name, value) for name, value in recorded if value is not None}

    async def _episode(self) -> None:
        env, task = self._env, self._task
        agents = vf.Agents(env.config, self._agent)
        await env.setup(agents)
        if not self._agents[0].trainable:
            raise ConfigError(f"{type(env).__name__}.setup of verifiers marks its agent as not trainable")
        try:
            await env.run(task, agents)
        except ExceptionGroup as errors:  # of a task group, whose own message has no cause
            raise _first(errors) from errors
        trace = self._trace()
        if type(env).finalize is not vf.Env.finalize:
            episode = vf.Episode(env=vf.EnvInfo(id=env.config.env_id), task=trace.task)
            episode.traces.append(trace)
            await env.finalize(task, episode)
        failure = self._agents[0].interactions[0].failure
        if failure is not None:
            raise failure

    def _agent(self, name: str, config: vf.AgentConfig) -> PolicyAgent:
        self._agents.append(PolicyAgent(name, config, self._exchange))
        return self._agents[-1]

    def _trace(self) -> vf.Trace:
        interactions = self._agents[0].interactions
        if not interactions or not interactions[0].trace.is_completed:
            raise ConfigError(f"{type(self._env).__name__}.run of verifiers ends without a finished run of its agent")
        return interactions[0].trace


def _first(error: Exception) -> Exception:
    """The first error of a group."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _finite(name: str, value: float) -> float:
    """The value.

    Raises:
        ValueError: It is not finite.
    """
    if not is_finite_number(value):
        raise ValueError(
            f"the reward or metric {name!r} of a task of verifiers is {value!r}, which is no finite number"
        )
    return value
