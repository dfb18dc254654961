"""A taskset of verifiers as an environment: its `Env.run` decides what the policy reads, the collector samples what it writes.

item    {"split": "train", "idx": 3, "data": {"prompt": "hello", "answer": "olleh", …}}
turns   what `Env.run` sends by `interaction.turn(…)`, and what the policy writes
rewards the functions that the task's class marks by `@vf.reward` and, with the weight 0, by `@vf.metric`
"""

import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from fuchsia_pl.envs import ConfigError, Item, Message, Rollout, RolloutStatus, ToolCall, ToolEnvironment, ToolResult
from fuchsia_pl.library.verifiers.exchange import Reply
from fuchsia_pl.library.verifiers.scores import SCORES, Signals, reward_function

if TYPE_CHECKING:
    import verifiers.v1 as vf

    from fuchsia_pl.library.verifiers.play import Play
    from fuchsia_pl.library.verifiers.world import World

PLAY = "verifiers_play"  # key in `Rollout.state` while the episode lasts
VERSION = "0.4"
REMEDY = 'pip install "fuchsia-pl[worlds]"'
MAX_TURNS = 8
TRAIN, VALIDATION = "train", "validation"
logger = logging.getLogger(__name__)


class VerifiersEnvironment(ToolEnvironment):
    """A taskset of verifiers 0.4, and its environment, unmodified.

    An error of the taskset ends its rollout as `env_error`. What cannot work without a container, a harness program or a second
    model is refused before an engine starts.

    Args:
        taskset: Name of an importable package with a taskset, such as "reverse-text".
        taskset_config: Fields of the taskset's config.
        environment: Fields of the environment's config; `id` names a package other than the taskset's.
        validation_config: Fields of the taskset's config that differ for the held-out tasks, such as its split; nested ones are
            merged. None: the first `num_validation` tasks are held out.
        num_tasks: Number of tasks that are read, held-out ones included unless they have a config. None: all of them.
        num_validation: Number of held-out tasks.
        max_turns: Maximum number of turns of a rollout. None: the limit of the environment's agent, else 8, and 1 for tasks with
            one question and no tools.
        recorded: Names of rewards that the environment records itself, or that a reward returns by key.

    Raises:
        ConfigError: verifiers 0.4 is not installed, the taskset cannot be loaded or does not work here, or a setting is wrong.
    """

    def __init__(
        self,
        taskset: str,
        taskset_config: dict[str, Any] | None = None,
        environment: dict[str, Any] | None = None,
        validation_config: dict[str, Any] | None = None,
        num_tasks: int | None = None,
        num_validation: int = 64,
        max_turns: int | None = None,
        recorded: list[str] | None = None,
    ) -> None:
        super().__init__()
        world = _world_class()
        config, settings = taskset_config or {}, environment or {}
        self._world: World = world(taskset, config, settings)
        self._held_out: World | None = None
        if validation_config is not None:
            self._held_out = world(taskset, merged(config, validation_config), settings)
        self._num_tasks, self._num_validation = num_tasks, num_validation
        self._check_numbers()
        self._signals: Signals = self._world.signals(recorded or [])
        self.reward_weights = self._signals.weights()
        self.reward_functions = [reward_function(name) for name in self.reward_weights]
        self.on_error = "unscored"
        self.servers = self._world.servers()
        self._check_servers()
        self.max_steps = self._max_turns(max_turns)
        self._tasks: dict[str, dict[int, vf.Task]] = {}
        self._unlogged: set[str] = set()
        self._prompts: dict[tuple[str, int], list[Message]] = {}

    @property
    def step_timeout_s(self) -> float:
        """Adds the time of tools, if there are any."""
        return super().step_timeout_s if self.servers else self.timeout_s

    def train_items(self) -> Sequence[Item]:
        """The tasks that are not held out."""
        return [_item(TRAIN, task) for task in self._split(TRAIN)]

    def validation_items(self) -> Sequence[Item]:
        """The held-out tasks."""
        return [_item(VALIDATION, task) for task in self._split(VALIDATION)]

    def messages(self, item: Item) -> list[Message]:
        """What the policy reads before its first turn. It is found once for each item."""
        key = (item["split"], item["idx"])
        if key not in self._prompts:
            self._prompts[key] = self._world_of(item).prompt(self._task(item), self.timeout_s)
        return self._prompts[key]

    def counter_names(self) -> list[str]:
        """Leaves out the counters of tool calls if there are no tools."""
        return super().counter_names() if self.servers else list(self.counters)

    async def prepare(self) -> None:
        """Starts what the environment of verifiers and the tools need."""
        for world in self._worlds:
            await world.start()
        if self.servers:
            await super().prepare()

    async def close(self) -> None:
        """Stops what `prepare` started."""
        try:
            await super().close()
        finally:
            async with AsyncExitStack() as stack:
                for world in self._worlds:
                    stack.push_async_callback(world.stop)

    async def open_rollout(self, rollout: Rollout) -> None:
        """Starts the episode, up to its first turn."""
        await super().open_rollout(rollout)
        play = self._world_of(rollout.item).play(self._task(rollout.item), self.max_response_chars)
        rollout.state[PLAY] = play
        if await play.start() != [
            {name: message[name] for name in ("role", "content")} for message in rollout.messages
        ]:
            raise RuntimeError(
                "the first messages differ from those of the prompt: the run of an environment must be repeatable"
            )

    async def step_rollout(self, rollout: Rollout) -> None:
        """Makes the tool calls of the newest turn, hands it to the episode, and responds with what the policy reads next."""
        play: Play = rollout.state[PLAY]
        calls = self.tool_convention.read(rollout.turns[-1].raw_answer, self.tools).calls if self.servers else ()
        results = await self.make_calls(rollout, calls)
        if rollout.status is not None:
            return
        messages = await play.go_on(self._reply(rollout, calls, results))
        if messages is None:
            rollout.finish(RolloutStatus.TRUNCATED if play.is_truncated else RolloutStatus.COMPLETED)
            return
        for message in messages:
            rollout.respond(message["content"])

    async def close_rollout(self, rollout: Rollout) -> None:
        """Lets a truncated episode score itself, reads the scores, and ends an episode that still runs."""
        play: Play | None = rollout.state.pop(PLAY, None)
        try:
            if play is not None and rollout.status is RolloutStatus.TRUNCATED:
                is_new = play.num_answered < len(rollout.turns)
                limit = "max_turns" if len(rollout.turns) >= self.max_steps and not is_new else "max_total_tokens"
                await play.stop(limit, self._reply(rollout) if is_new else None)
            if play is not None and rollout.status in (RolloutStatus.TRUNCATED, RolloutStatus.COMPLETED):
                metrics = play.metrics()
                rollout.state[SCORES] = self._signals.values(play.rewards(), metrics)
                self._warn_of(set(metrics) - set(self._signals.metrics))
        finally:
            if play is not None:
                await play.cancel()
            await super().close_rollout(rollout)

    def _reply(self, rollout: Rollout, calls: Sequence[ToolCall] = (), results: Sequence[ToolResult] = ()) -> Reply:
        turn = rollout.turns[-1]
        num_completion_tokens = len(turn.completion.token_ids)
        opening = self.tool_convention.opening
        before_calls = turn.raw_answer.partition(opening)[0].strip() if opening else ""
        return Reply(
            text=before_calls if calls else turn.answer,
            thinking=None if turn.text == turn.answer else turn.text.removesuffix(turn.answer),
            is_cut=turn.completion.finish_reason == "length",
            num_prompt_tokens=len(rollout.token_ids) - num_completion_tokens,
            num_completion_tokens=num_completion_tokens,
            calls=calls,
            results=results,
        )

    def _warn_of(self, metrics: set[str]) -> None:
        """Warns once of each metric that a run or a function records under a name of its own."""
        for name in sorted(metrics - self._unlogged):
            logger.warning(
                "the metric %r of %r is not logged: only the functions marked by @vf.metric are", name, self._world.name
            )
        self._unlogged |= metrics

    def _split(self, split: str) -> "list[vf.Task]":
        if split not in self._tasks:
            self._tasks = self._read_tasks()
        return list(self._tasks[split].values())

    def _task(self, item: Item) -> "vf.Task":
        self._split(item["split"])
        return self._tasks[item["split"]][item["idx"]]

    def _read_tasks(self) -> "dict[str, dict[int, vf.Task]]":
        tasks = self._world.tasks(self._num_tasks)
        if self._held_out is not None:
            held_out = self._held_out.tasks(self._num_validation)
        else:
            self._check_rest(len(tasks))
            held_out, tasks = tasks[: self._num_validation], tasks[self._num_validation :]
        return {TRAIN: {task.data.idx: task for task in tasks}, VALIDATION: {task.data.idx: task for task in held_out}}

    @property
    def _worlds(self) -> "list[World]":
        return [self._world] if self._held_out is None else [self._world, self._held_out]

    def _world_of(self, item: Item) -> "World":
        """The taskset and environment of an item: held-out tasks may have a config of their own."""
        return self._held_out if self._held_out is not None and item["split"] == VALIDATION else self._world

    def _check_servers(self) -> None:
        if self._held_out is not None and self._held_out.servers() != self.servers:
            raise ConfigError(
                "validation_config changes the tools, and all rollouts of a run share them: leave the fields of tools out of it"
            )

    def _check_rest(self, number: int) -> None:
        if number <= self._num_validation:
            raise ConfigError(
                f"the taskset {self._world.name!r} has {number} tasks, and num_validation={self._num_validation} of them are "
                "held out: lower it, or raise num_tasks if it is set"
            )

    def _check_numbers(self) -> None:
        if self._num_validation < 0 or (self._num_tasks is not None and self._num_tasks < 1):
            raise ConfigError(
                "VerifiersEnvironment takes num_tasks of 1 or more and num_validation of 0 or more, "
                f"got {self._num_tasks} and {self._num_validation}"
            )

    def _max_turns(self, given: int | None) -> int:
        if given is not None and given < 1:
            raise ConfigError(f"VerifiersEnvironment takes max_turns of 1 or more, got {given}")
        if not self._world.is_single_turn or self.servers:
            return given or self._world.max_turns or MAX_TURNS
        if given is not None and given > 1:
            raise ConfigError(
                f"max_turns={given} has no effect: tasks of {self._world.name!r} are one question without tools: leave it out"
            )
        return 1


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with some fields changed.

    >>> merged({"task": {"a": 1, "b": 2}, "seed": 0}, {"task": {"b": 3}})
    {'task': {'a': 1, 'b': 3}, 'seed': 0}
    """
    both = {key for key in changes if isinstance(changes[key], Mapping) and isinstance(config.get(key), Mapping)}
    return {**config, **changes, **{key: merged(config[key], changes[key]) for key in both}}


def _item(split: str, task: "vf.Task") -> Item:
    return {"split": split, "idx": task.data.idx, "data": task.data.model_dump(mode="json", exclude_defaults=True)}


def _world_class() -> "type[World]":
    """The class that uses the library.

    Raises:
        ConfigError: The library is missing, or has another version.
    """
    try:
        installed = importlib.metadata.version("verifiers")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"VerifiersEnvironment needs verifiers {VERSION}, which is not installed: {REMEDY}"
        ) from error
    if not installed.startswith(f"{VERSION}."):
        raise ConfigError(f"VerifiersEnvironment needs verifiers {VERSION}, and {installed} is installed: {REMEDY}")
    from fuchsia_pl.library.verifiers.world import World

    return World
