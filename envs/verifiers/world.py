"""A taskset and an environment of verifiers, by name: loading, checks, prompts and plays."""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import verifiers.v1 as vf
from pydantic import ValidationError
from verifiers.v1.configs.agent import agent_config_fields

from fuchsia_pl.envs import ConfigError, MCPServer, Message
from fuchsia_pl.envs.bounded import call_apart
from fuchsia_pl.envs.user_code import reason, user_code
from fuchsia_pl.library.verifiers.messages import as_ours, opening_messages
from fuchsia_pl.library.verifiers.play import Play
from fuchsia_pl.library.verifiers.refusals import check_env, check_task, check_task_type
from fuchsia_pl.library.verifiers.scores import Signals
from fuchsia_pl.library.verifiers.toolsets import servers_of

T = TypeVar("T")
NUM_SETTLING = 20  # turns of the event loop in which further runs of an agent begin


class World:
    """An environment of verifiers over one taskset.

    Args:
        taskset: Name of the package of the taskset.
        taskset_config: Fields of its config.
        environment: Fields of the environment's config; `id` names its package.

    Raises:
        ConfigError: There is no such package, a field is wrong, or something of it does not work here.
    """

    def __init__(self, taskset: str, taskset_config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        self.name = taskset
        if "taskset" in environment:
            raise ConfigError("environment has a 'taskset': the settings taskset and taskset_config name it")
        config = {**environment, "taskset": {**taskset_config, "id": taskset}}
        self.env: vf.Env = self._loaded(lambda: vf.load_environment(vf.resolve_env_config(config)))
        check_env(self.env, set(environment))
        kind = type(self.env.taskset).task_type()
        # A task without data: its functions and settings do not depend on data.
        self.sample_task: vf.Task = kind.__new__(kind)
        self.sample_task.config = self.env.taskset.config.task
        self._loaded(lambda: check_task_type(self.sample_task))
        self._is_started = False

    @property
    def is_single_turn(self) -> bool:
        """Whether a task is one question and one answer, apart from tool calls."""
        return type(self.env).run is vf.SingleAgentEnv.run

    @property
    def max_turns(self) -> int | None:
        """The limit of turns of the environment's agent; None if it has none."""
        (config,) = agent_config_fields(self.env.config).values()
        return config.max_turns

    def signals(self, recorded: Sequence[str]) -> Signals:
        """Names and weights of what the tasks score.

        Args:
            recorded: Names of further rewards.

        Raises:
            ConfigError: A name occurs twice.
        """
        task = self.sample_task
        rewards = {function.__name__: getattr(function, "_vf_weight", 1.0) for function in task.hooks("reward")}
        judges = {judge.reward_name: judge.config.weight for judge in task.plugged_judges()}
        metrics = [function.__name__ for function in task.hooks("metric")]
        return Signals({**rewards, **judges}, metrics, recorded)

    def play(self, task: vf.Task, max_chars: int) -> Play:
        """A new episode.

        Args:
            task: Its task.
            max_chars: Largest length of a message for the policy after its first turn.
        """
        return Play(self.env, task, max_chars)

    async def start(self) -> None:
        """Starts what the environment needs for all episodes. A second call does nothing."""
        if not self._is_started:
            await self.env.start()
            self._is_started = True

    async def stop(self) -> None:
        """Stops what `start` started."""
        if self._is_started:
            self._is_started = False
            await self.env.stop()

    def servers(self) -> list[MCPServer]:
        """The toolsets as servers.

        Raises:
            ConfigError: A toolset does not work here.
        """
        return self._loaded(lambda: servers_of(self.sample_task, self.env.taskset))

    def tasks(self, number: int | None) -> list[vf.Task]:
        """The first tasks.

        Args:
            number: How many; None for all.

        Raises:
            ConfigError: The taskset is infinite and no number is given, it cannot be loaded, or a task does not work here.
        """
        taskset = self.env.taskset
        if number is None and not taskset.bounded:
            raise ConfigError(f"the taskset {self.name!r} is infinite: set num_tasks")
        tasks = self._loaded(lambda: list(itertools.islice(taskset, number)))
        for task in tasks:
            check_task(task)
        return tasks

    def prompt(self, task: vf.Task, timeout_s: float) -> list[Message]:
        """The messages before the policy's first turn.

        An environment with a `run` of its own decides what the policy reads first. Its `run` is started for that, and ended at
        the first turn.

        Args:
            task: The task.
            timeout_s: Time limit in seconds.

        Raises:
            ConfigError: There is no first turn, or its messages are not text.
        """
        if self.is_single_turn:
            if task.data.prompt is None:
                raise ConfigError(
                    f"task {task.data.idx} of {self.name!r} has no prompt, and its environment sends none"
                )
            return as_ours(opening_messages(task.data, []))
        return call_apart(asyncio.run, self._first_messages(task, timeout_s))

    async def _first_messages(self, task: vf.Task, timeout_s: float) -> list[Message]:
        play = Play(self.env, task, max_chars=0)
        try:
            async with asyncio.timeout(timeout_s):
                messages = await play.start()
                for _ in range(NUM_SETTLING):
                    await asyncio.sleep(0)
            play.raise_failure()
            return messages
        except TimeoutError as error:
            raise ConfigError(
                f"{type(self.env).__name__}.run of verifiers asks for no turn within {timeout_s:g} s"
            ) from error
        finally:
            await play.cancel()

    def _loaded(self, load: Callable[[], T]) -> T:
        """Calls code of the packages.

        Raises:
            ConfigError: It raised.
        """
        try:
            with user_code():
                return load()
        except ConfigError:
            raise
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"{self.name!r} of verifiers does not take these settings: {where}: {first['msg']}"
            ) from error
        except Exception as error:  # packages may raise anything
            raise ConfigError(
                f"{self.name!r} of verifiers cannot be loaded: {' '.join(reason(error).split())}"
            ) from error
