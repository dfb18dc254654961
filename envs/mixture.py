"""Several environments in one run. Items are drawn by weight; all else stays with each environment.

item    an item of one part, with the part's name
prompt  that of the part's environment

A rollout belongs to one part: its environment talks to the policy, its reward functions score it, and its `is_correct` and
`answer` judge it. Tools, MCP servers, stop strings and limits of time are the part's own, too.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from fuchsia_pl.envs import ConfigError, Difficulty, Environment, Item, Message, Rollout, SingleTurnEnvironment
from fuchsia_pl.envs.audit.task import AuditTask
from fuchsia_pl.envs.base import check_environment, check_rewards, is_finite_number
from fuchsia_pl.envs.parts import Part, PartItem, PartItems
from fuchsia_pl.envs.self_driven import SelfDrivenEnvironment

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
# First words of the names of metrics, which begin with the name of a part where they are about one.
TAKEN = ("count", "curriculum", "perf", "reward", "rollout", "sync", "teacher", "test", "train", "validation")


class Mixture(Environment):
    """Several environments, each with a name.

    Over a run, each part has its share of the drawn items, within half as many items as there are parts. The shares do not depend
    on the numbers of items: a small part is passed over more often. Every held-out item of every part is evaluated.

    Args:
        parts: The environments with their settings, by name. Metrics of a part are logged as `name/metric`.

    Raises:
        ConfigError: A name or a setting of a part is not allowed, or its environment cannot be used.
    """

    def __init__(self, parts: dict[str, Part]) -> None:
        super().__init__()
        if not parts:
            raise ConfigError("Mixture.parts is empty: name at least one environment")
        for name, part in parts.items():
            _check_name(name)
            try:
                _check_part(part)
            except ConfigError as error:
                raise ConfigError(f"the part {name!r} of the mixture: {error}") from error
            if part.max_turns is not None:
                part.environment.max_steps = part.max_turns
        if len({id(part.environment) for part in parts.values()}) < len(parts):
            raise ConfigError("two parts of the mixture have the same object as environment: make one for each")
        self.mixed = parts
        self.max_steps = max(part.environment.max_steps for part in parts.values())

    def train_items(self) -> PartItems:
        """The training items of all parts."""
        return self._split(lambda environment: environment.train_items())

    def validation_items(self) -> PartItems:
        """The held-out items of all parts."""
        return self._split(lambda environment: environment.validation_items())

    def messages(self, item: Item) -> list[Message]:
        """The prompt of an item, made by its own environment."""
        environment, row = self._owner(item)
        return environment.messages(row)

    def gold_turns(self, item: Item) -> list[str] | None:
        """The turns of a perfect policy, as far as its own environment has them."""
        environment, row = self._owner(item)
        return environment.gold_turns(row)

    def check_gold(self, item: Item) -> str | None:
        """The fault of an item's gold answer that its own environment finds."""
        environment, row = self._owner(item)
        return environment.check_gold(row)

    def difficulty(self, item: Item) -> Difficulty | None:
        """The difficulty that its own environment gives an item; its kind begins with the name of the part."""
        own = self._of_part(item)
        found = self.mixed[own.part].environment.difficulty(own.row)
        return None if found is None else Difficulty(f"{own.part}/{found.kind}", found.level)

    def step_rollout(self, rollout: Rollout) -> None:
        """Never called: the environment of its part runs a rollout.

        Raises:
            RuntimeError: It was called.
        """
        raise RuntimeError(
            "a mixture runs no rollout itself: collector_for makes the collector that gives it to its part"
        )

    async def close(self) -> None:
        """Closes all environments, also if one of them fails."""
        async with AsyncExitStack() as stack:
            for part in self.mixed.values():
                stack.push_async_callback(part.environment.close)

    def audit_tasks(self, all_tasks: bool) -> list[AuditTask]:
        """The configured tasks of the parts that have tasks; a mixture cannot be audited with tasks that it does not have."""
        tasks = (part.environment.audit_tasks(all_tasks=False) for part in self.mixed.values())
        return [] if all_tasks else [task for of_part in tasks for task in of_part]

    def rewards_gb(self, device_index: int | None) -> float:
        """Memory of the reward functions of all parts on a GPU, in GiB."""
        return sum(part.environment.rewards_gb(device_index) for part in self.mixed.values())

    def counter_names(self) -> list[str]:
        """The counters of all parts; equal names are counted together."""
        names = [part.environment.counter_names() for part in self.mixed.values()]
        return list(dict.fromkeys(name for of_part in names for name in of_part))

    def is_correct(self, rollout: Rollout) -> bool:
        """The judgement of the rollout's own environment."""
        return self.mixed[rollout.part].environment.is_correct(rollout)

    def answer(self, rollout: Rollout) -> str | None:
        """The answer that the rollout's own environment reads."""
        return self.mixed[rollout.part].environment.answer(rollout)

    def _owner(self, item: Item) -> tuple[Environment, Item]:
        own = self._of_part(item)
        return self.mixed[own.part].environment, own.row

    def _of_part(self, item: Item) -> PartItem:
        if not isinstance(item, PartItem):
            raise ConfigError(
                f"the item does not name its part of the mixture, which has {list(self.mixed)}: give the environment of that "
                "part instead (data.environment.class_path)"
            )
        return item

    def _split(self, items: Callable[[Environment], Sequence[Item]]) -> PartItems:
        return PartItems({name: items(part.environment) for name, part in self.mixed.items()})


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or name in TAKEN:
        raise ConfigError(
            f"{name!r} is no name for a part of a mixture: it may have letters, digits, _ and -, a letter first, and must not be "
            f"{', '.join(TAKEN)}, with which other metrics begin"
        )


def _check_turns(environment: Environment, max_turns: int) -> None:
    """Raises ConfigError for a number of turns that is not allowed, or would have no effect."""
    if max_turns < 1:
        raise ConfigError(f"max_turns must be 1 or more, got {max_turns}")
    if isinstance(environment, SelfDrivenEnvironment):
        raise ConfigError(
            f"max_turns is {max_turns}, which has no effect on {type(environment).__name__}: its "
            "own settings limit its turns. Leave it out"
        )
    if isinstance(environment, SingleTurnEnvironment) and max_turns > 1:
        raise ConfigError(f"max_turns is {max_turns}, and {type(environment).__name__} has one turn: leave it out")


def _check_part(part: Part) -> None:
    """Raises ConfigError for settings that are not allowed, whatever the run."""
    if part.environment.mixed:
        raise ConfigError("it is a mixture itself: list its parts here instead, with their shares as weights")
    if part.environment.max_rows > 1:
        raise ConfigError("its rollouts have several rows (an agent), which a mixture does not support: train it alone")
    if not is_finite_number(part.weight) or part.weight <= 0:
        raise ConfigError(
            f"weight must be a finite number above 0, got {part.weight}: leave a part out to draw nothing of it"
        )
    if part.max_turns is not None:
        _check_turns(part.environment, part.max_turns)
    check_environment(part.environment)
    check_rewards(part.environment)
