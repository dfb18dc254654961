"""The environment of an agent that brings its own loop."""

import asyncio
import logging
import shutil
from dataclasses import dataclass, field
from typing import Any

from fuchsia_pl.envs.bounded import ENDS_RUN
from fuchsia_pl.envs.self_driven import SelfDrivenEnvironment, TurnSource
from fuchsia_pl.envs.user_code import reason
from fuchsia_pl.gateway.agents import Access, Agent, CommandAgent, EntryAgent, imported
from fuchsia_pl.gateway.server import LOOPBACK, AgentServer
from fuchsia_pl.gateway.sessions import REFUSED, REQUESTS, FloodError, Session
from fuchsia_pl.types import ConfigError, Rollout, RolloutStatus

RESULT = "result"  # key in `Rollout.state`: what the agent returned
ERRORS, TIMEOUTS, FLOODS = "agent_errors", "agent_timeouts", "agent_floods"  # counters
END_TIMEOUT_S = 10.0
logger = logging.getLogger(__name__)


@dataclass
class AgentSettings:
    """Limits of an agent, and the address of its endpoint.

    Attributes:
        max_requests: Most turns that the policy writes for one agent.
        max_rows: Most rows of a rollout. An agent that rewrites its history begins a new one.
        timeout_s: Time limit of one agent in seconds.
        max_body_kb: Largest request, in KiB.
        host: Address of the endpoint. Other machines reach it only if it is not a loopback address, and with a rollout's key.
        port: Port of the endpoint, 0 for a free one.
        variables: Further environment variables of a command.
    """

    max_requests: int = 32
    max_rows: int = 4
    timeout_s: float = 600.0
    max_body_kb: int = 4096
    host: str = LOOPBACK
    port: int = 0
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ConfigError for a limit with which no agent could run."""
        limits = {"max_requests": self.max_requests, "max_rows": self.max_rows, "max_body_kb": self.max_body_kb}
        for name, value in limits.items():
            if value < 1:
                raise ConfigError(f"AgentEnvironment.settings.{name} must be 1 or more, got {value}")
        if self.timeout_s <= 0:
            raise ConfigError(f"AgentEnvironment.settings.timeout_s must be above 0, got {self.timeout_s}")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"AgentEnvironment.settings.port must be a port or 0, got {self.port}")


class AgentEnvironment(SelfDrivenEnvironment):
    """Trains an agent as it is: code that solves an item with an OpenAI client.

    For each rollout the agent gets the address and the key of an endpoint that speaks `/v1/chat/completions`. What it asks there
    is sampled by the run's engine with the run's seeds, and the sampled ids are trained on. What it returns is in
    `rollout.state["result"]`, for reward functions; None if the agent failed.

    An agent that fails, hangs or floods ends its own rollout, which is counted and not trained on. A rollout whose
    limits are used up is truncated, whatever the agent does then.

    Args:
        entry: "module:function" of a function `run(item, base_url, api_key)`, sync or async.
        command: Program and arguments, instead of `entry`. The program reads the item as JSON from its standard input and finds
            the endpoint in OPENAI_BASE_URL and OPENAI_API_KEY; its standard output is its result.
        rewards: "module:function" of each reward function.
        train_file: See `Environment`.
        validation_file: See `Environment`.
        prompt_field: Field of an item with a prompt. It stands for the agent's own first prompt where lengths are checked.
        settings: Limits of an agent, and the address of its endpoint.

    Raises:
        ConfigError: There is neither an entry nor a command, or both, or one of the functions or the program does not exist.
    """

    def __init__(
        self,
        entry: str | None = None,
        command: list[str] | None = None,
        rewards: list[str] | None = None,
        train_file: str | list[str] | None = None,
        validation_file: str | list[str] | None = None,
        prompt_field: str = "prompt",
        settings: AgentSettings | None = None,
    ) -> None:
        super().__init__(train_file=train_file, validation_file=validation_file, prompt_field=prompt_field)
        self.settings = settings or AgentSettings()
        self.agent = make_agent(entry, command, self.settings)
        self.reward_functions = [imported("rewards", path, ("rollouts",)) for path in rewards or ()]
        self.counters = [REQUESTS, REFUSED, ERRORS, TIMEOUTS, FLOODS]
        # A row that an agent begins may be longer than the item's prompt, as with any environment of several turns.
        self.max_steps = max(self.settings.max_requests, 2)
        self.max_rows = self.settings.max_rows
        self._server: AgentServer | None = None

    @property
    def max_turns(self) -> int:
        """Most turns of a rollout."""
        return self.settings.max_requests

    @property
    def rollout_timeout_s(self) -> float:
        """Time limit in seconds of one call of `run_rollout`."""
        return self.settings.timeout_s

    async def prepare(self) -> None:
        """Starts the server of the endpoints.

        Raises:
            ConfigError: Its address cannot be used.
        """
        if self._server is None or not self._server.is_running:
            server = AgentServer(self.settings.host, self.settings.port, self.settings.max_body_kb * 1024)
            await server.start()
            self._server = server

    async def close(self) -> None:
        """Stops the server and what agents share."""
        server, self._server = self._server, None
        try:
            if server is not None:
                await server.stop()
            await self.agent.close()
        finally:
            await super().close()

    async def run_rollout(self, rollout: Rollout, policy: TurnSource) -> None:
        """Runs the agent once; a failure of its code is the status of the rollout.

        Raises:
            LeftThreadsError: Agents leave too many threads behind.
            RunEndingConfigError: The code of the agent raised it.
        """
        assert self._server is not None, "prepare comes first"
        session = Session(policy, rollout.temperature, rollout.counts)
        failure: Exception | None = None
        rollout.state[RESULT] = None
        self._server.add(session)
        try:
            access = Access(self._server.base_url, session.key, self.settings.timeout_s)
            rollout.state[RESULT] = await self._result(rollout, session, access)
        except ENDS_RUN:
            raise
        except Exception as error:  # the code of the agent may raise anything
            failure = error
        finally:
            await self._server.end(session)
        self._finish(rollout, policy.ran_out, failure)

    def _finish(self, rollout: Rollout, ran_out: bool, failure: Exception | None) -> None:
        """Sets the status. What an agent does after a limit was used up does not matter."""
        if ran_out or failure is None:
            rollout.finish(RolloutStatus.TRUNCATED if ran_out else RolloutStatus.COMPLETED)
            return
        rollout.counts[_counter(failure)] += 1
        words = _words(failure, self.settings.timeout_s)
        logger.warning("the agent failed on item %d, sibling %d: %s", rollout.item_index, rollout.sibling, words)
        rollout.finish(RolloutStatus.ENV_ERROR)

    async def _result(self, rollout: Rollout, session: Session, access: Access) -> Any:
        """What the agent returns. It is ended if its session fails."""
        agent = asyncio.ensure_future(self.agent.run(rollout.item, access))
        try:
            await asyncio.wait({agent, session.failed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not agent.done():
                agent.cancel()
                await asyncio.wait({agent}, timeout=END_TIMEOUT_S)
        return session.failed.result() if session.failed.done() else agent.result()


def make_agent(entry: str | None, command: list[str] | None, settings: AgentSettings) -> Agent:
    """The agent of a setting.

    Raises:
        ConfigError: See `AgentEnvironment`.
    """
    if (entry is None) == (command is None):
        raise ConfigError(f"AgentEnvironment takes either an entry or a command, got {entry!r} and {command!r}")
    if entry is not None:
        if settings.variables:
            raise ConfigError(
                "AgentEnvironment.settings.variables are those of a command, and there is an entry: leave them out"
            )
        return EntryAgent(entry)
    if isinstance(command, str) or not command:
        raise ConfigError(f"AgentEnvironment.command must be a list of words, got {command!r}")
    if shutil.which(command[0]) is None:
        raise ConfigError(f"AgentEnvironment.command: the program {command[0]!r} is not found")
    return CommandAgent(command, settings.variables)


def _counter(error: Exception) -> str:
    if isinstance(error, FloodError):
        return FLOODS
    return TIMEOUTS if isinstance(error, TimeoutError) else ERRORS


def _words(error: Exception, timeout_s: float) -> str:
    return f"it took longer than {timeout_s:g} s" if isinstance(error, TimeoutError) else reason(error)
