"""Environments: where questions come from, what happens to an answer, and what it is worth."""

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fuchsia_pl.envs.conversation import prompt_messages
from fuchsia_pl.envs.items import ItemSource, load_items
from fuchsia_pl.envs.table_rows import CSV_TYPES
from fuchsia_pl.envs.thinking import THINKING_MARKS, check_marks
from fuchsia_pl.envs.tools.convention import PLAIN, ToolConvention
from fuchsia_pl.envs.tools.spec import ToolSpec
from fuchsia_pl.envs.user_code import user_code
from fuchsia_pl.types import ConfigError, Item, Message, Rollout

Rewards = list[float] | list[float | None]
RewardFunction = Callable[..., Rewards | Awaitable[Rewards]]
# What a reward function may have beside a name: the names under which it counts in `Rollout.counts`, its end, and what is
# wrong with an item's gold answer.
COUNTERS = "counters"
CLOSE = "close"
CHECK_GOLD = "check_gold"
PREPARE_TIMEOUT_S = 1800.0


class Environment(ABC):
    """Configured once from YAML; each rollout of it has a `Rollout` of its own as its state.

    Args:
        dataset: Items from the hub, such as "openai/gsm8k". An environment that makes its own items overrides `train_items`.
        dataset_config: The hub dataset's configuration, such as "main".
        train_split: The hub dataset's split to train on.
        validation_split: The hub dataset's held-out split.
        train_file: Local files in place of the hub: one, several, or a pattern such as "data/*.jsonl". JSON lines, a JSON array,
            CSV, Parquet, or a folder that `save_to_disk` of `datasets` made; gzip is read too.
        validation_file: The same for the held-out split.
        prompt_field: The field of an item that is the question: a text, or a list of messages.

    Attributes:
        reward_functions: Each is `f(rollouts, *args, **kwargs) -> list[float]`, sync or async, called once per group of
            siblings; None in place of a number means that it does not score that rollout. Its name in logs is its `__name__`.
        reward_weights: Weight of each reward function by name in the total, 1.0 where not given.
        initial_reward_weights: Weights at step 0 of those that change: they move in a straight line to `reward_weights`.
        ramp_steps: The optimizer step at which they arrive there.
        csv_types: Types of the columns of CSV files by name: "int", "float", "bool", "json". Other columns are text.
        stop: Strings after which the policy's turn ends, but not where it is thinking or in the middle of a tool call's JSON.
        max_steps: Turns of the policy in one rollout.
        timeout_s: Bound of each call of a reward function and of each of the environment's own methods.
        on_error: What an exception in a reward function or in `step_rollout` does: "stop" ends the run with the item and
            the cause; "unscored" counts it and learns nothing from the rollouts concerned (of a reward function: the group).
        max_response_chars: Longest text of one `rollout.respond` that the policy reads. The middle of a longer one is left out
            before it is encoded, which takes seconds for megabytes, and a note in its place gives the number of characters.
        counters: Names that its rollouts may count under, see `Rollout.counts`.
        tools: What the policy may call, known after `prepare`.
        tool_convention: How the policy's model writes tool calls; set before the first rollout.
        thinking_marks: Pairs of marks that enclose reasoning, which is neither an answer nor a tool call. Empty for none.
    """

    max_steps = 1

    def __init__(
        self,
        dataset: str | None = None,
        dataset_config: str | None = None,
        train_split: str = "train",
        validation_split: str = "test",
        train_file: str | list[str] | None = None,
        validation_file: str | list[str] | None = None,
        prompt_field: str = "prompt",
    ) -> None:
        self._sources = {
            "train": ItemSource(train_file, dataset, dataset_config, train_split),
            "validation": ItemSource(validation_file, dataset, dataset_config, validation_split),
        }
        self._loaded: dict[str, Sequence[Item]] = {}
        self.prompt_field = prompt_field
        self.reward_functions: list[RewardFunction] = []
        self.reward_weights: dict[str, float] = {}
        self.initial_reward_weights: dict[str, float] = {}
        self.ramp_steps = 0
        self.csv_types: dict[str, str] = {}
        self.stop: list[str] = []
        self.timeout_s = 60.0
        self.max_response_chars = 65_536
        self.on_error: Literal["stop", "unscored"] = "stop"
        self.counters: list[str] = []
        self.tools: list[ToolSpec] = []
        self.tool_convention: ToolConvention = PLAIN
        self.thinking_marks: Sequence[tuple[str, str]] = THINKING_MARKS

    if not TYPE_CHECKING:  # to a checker, every misspelt attribute would exist

        def __getattr__(self, name: str) -> Any:
            """Called where an attribute is missing: tells a constructor that sets nothing from a misspelt name."""
            if name in _set_by_constructor():
                raise ConfigError(_lacks_constructor(self))
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def train_items(self) -> Sequence[Item]:
        """The rows that training draws from."""
        return self._items("train")

    def validation_items(self) -> Sequence[Item]:
        """The held-out rows, which training never draws."""
        return self._items("validation")

    def messages(self, item: Item) -> list[Message]:
        """The conversation that the policy is asked to continue, as `{"role": …, "content": …}`.

        By default it is `prompt_field` of the item: a text is what the user says, a list of messages is the conversation.

        Raises:
            ConfigError: The field is missing, null, empty, or of another type.
        """
        return prompt_messages(item, self.prompt_field)

    def gold_turns(self, item: Item) -> list[str] | None:
        """What a perfect policy would write, turn by turn; None where that is not known. `fuchsia check-env` plays it."""
        return None

    def check_gold(self, item: Item) -> str | None:
        """What is wrong with an item's gold answer, None where the rewards can use it.

        `fuchsia check-env` and the start of `fuchsia fit` call it for every item: no gold answer may end a run in the middle.
        By default each reward function that has a `check_gold(item)` of its own is asked.
        """
        checks = [getattr(function, CHECK_GOLD) for function in self.reward_functions if hasattr(function, CHECK_GOLD)]
        return next((problem for check in checks if (problem := check(item)) is not None), None)

    async def prepare(self) -> None:
        """Called before every batch of rollouts: starts what does not run, such as tool servers."""

    async def close(self) -> None:
        """Ends what `prepare` and the reward functions started. Called once, also after an error."""
        for function in self.reward_functions:
            if hasattr(function, CLOSE):
                getattr(function, CLOSE)()

    async def open_rollout(self, rollout: Rollout) -> None:
        """Called when a rollout starts."""

    @abstractmethod
    def step_rollout(self, rollout: Rollout) -> Awaitable[None] | None:
        """Reacts to the newest turn: `rollout.respond(text)` goes on, `rollout.finish()` ends the interaction.

        Sync or async; a sync one runs in a thread, so that it stalls only its own rollout.
        """

    async def close_rollout(self, rollout: Rollout) -> None:
        """Called when a rollout has ended in whatever way; its rewards are not known yet."""

    @property
    def step_timeout_s(self) -> float:
        """Bound of one call of `step_rollout`."""
        return self.timeout_s

    @property
    def prepare_timeout_s(self) -> float:
        """Bound of one call of `prepare`, which may load much: a net for one that hangs. Override it where it takes longer."""
        return PREPARE_TIMEOUT_S

    def counter_names(self) -> list[str]:
        """What `Rollout.counts` may hold: `counters` and what the reward functions count."""
        own = (getattr(function, COUNTERS, ()) for function in self.reward_functions)
        return [*self.counters, *(name for names in own for name in names)]

    def reward_weight(self, name: str, step: int | None) -> float:
        """Weight of a reward function at an optimizer step; held-out rollouts (None) get the last one."""
        last = self.reward_weights.get(name, 1.0)
        first = self.initial_reward_weights.get(name, last)
        done = 1.0 if step is None or step >= self.ramp_steps else step / self.ramp_steps
        return first * (1.0 - done) + last * done

    def is_correct(self, rollout: Rollout) -> bool:
        """Whether a scored rollout counts as right in `accuracy`: by default, 1.0 or more from the first reward function."""
        reward = rollout.rewards[reward_name(self.reward_functions[0])]
        return reward is not None and reward >= 1.0

    def _items(self, split: str) -> Sequence[Item]:
        if split not in self._loaded:
            self._loaded[split] = load_items(type(self).__name__, split, self._sources[split], self.csv_types)
        return self._loaded[split]


class SingleTurnEnvironment(Environment):
    """One question, one answer."""

    def step_rollout(self, rollout: Rollout) -> None:
        """Ends the interaction after the first answer."""
        rollout.finish()


class MultiTurnEnvironment(Environment):
    """A conversation: override `step_rollout`, and set `max_steps`, `stop` and `reward_functions` in the constructor.

    A rollout that has not finished after `max_steps` turns is truncated.
    """

    max_steps = 8


def reward_name(function: RewardFunction) -> str:
    """The name of a reward function in logs and in `reward_weights`.

    Raises:
        ConfigError: It has none, as is the case for a functools.partial.

    >>> def correct(rollouts): ...
    >>> reward_name(correct)
    'correct'
    """
    name = function.__name__ if hasattr(function, "__name__") else ""
    if not name or name == "<lambda>":
        raise ConfigError(f"the reward function {function!r} has no name to log it by: define it with `def`")
    return name


def check_environment(environment: Environment) -> None:
    """Refuses an environment that could not be trained on.

    Raises:
        ConfigError: Its constructor left out the base class's, no reward function, two of one name, a weight that is no finite
            number or for a name that none has, a choice that is none, no turn, or marks of thinking that could not be found.
    """
    kind = type(environment).__name__
    if not _set_by_constructor() <= set(vars(environment)):
        raise ConfigError(_lacks_constructor(environment))
    names = [reward_name(function) for function in environment.reward_functions]
    if not names:
        raise ConfigError(
            f"{kind}.reward_functions is empty: without a reward there is nothing to learn. Set it in {kind}.__init__, after "
            "super().__init__()"
        )
    if len(set(names)) < len(names):
        raise ConfigError(
            f"{kind}.reward_functions has two functions of one name in {names}: rewards are logged by name"
        )
    for attribute, weights in {
        "reward_weights": environment.reward_weights,
        "initial_reward_weights": environment.initial_reward_weights,
    }.items():
        unknown = sorted(set(weights) - set(names))
        if unknown:
            raise ConfigError(f"{kind}.{attribute} has {unknown}; the reward functions are {names}")
        endless = {name: weight for name, weight in weights.items() if not is_finite_number(weight)}
        if endless:
            raise ConfigError(f"{kind}.{attribute} must be finite numbers, got {endless}")
    if environment.initial_reward_weights and environment.ramp_steps < 1:
        raise ConfigError(
            f"{kind}.initial_reward_weights needs ramp_steps of 1 or more, got {environment.ramp_steps}: over how many steps "
            "do they change?"
        )
    if environment.on_error not in ("stop", "unscored"):
        raise ConfigError(f'{kind}.on_error must be "stop" or "unscored", got {environment.on_error!r}')
    unknown = sorted(set(environment.csv_types.values()) - set(CSV_TYPES))
    if unknown:
        raise ConfigError(f"{kind}.csv_types has the types {unknown}; allowed are {sorted(CSV_TYPES)}")
    if environment.max_steps < 1:
        raise ConfigError(f"{kind}.max_steps must be 1 or more, got {environment.max_steps}")
    limit = environment.max_response_chars
    if not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"{kind}.max_response_chars must be a whole number, 1 or more, got {limit!r}")
    if environment.timeout_s <= 0:
        raise ConfigError(f"{kind}.timeout_s must be above 0, got {environment.timeout_s}")
    check_marks(environment.thinking_marks)


def _set_by_constructor() -> set[str]:
    """The attributes that every environment has once its base class's constructor has run."""
    return set(vars(SingleTurnEnvironment()))


def _lacks_constructor(environment: Environment) -> str:
    kind = type(environment).__name__
    return f"{kind}.__init__ does not call super().__init__(), which sets what every environment has: call it first"


def is_finite_number(value: object) -> bool:
    """Whether a value is a number that is neither infinite nor NaN; one that is too large for a float is not.

    >>> is_finite_number(1), is_finite_number(True), is_finite_number("1"), is_finite_number(10**400)
    (True, True, False, False)
    """
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except Exception:  # a tensor of several numbers, or an object of user code, may raise anything
        return False


def weights_at(environment: Environment, step: int | None) -> dict[str, float]:
    """The weight of every reward function at a step."""
    names = [reward_name(function) for function in environment.reward_functions]
    with user_code(f"{type(environment).__name__}.reward_weight"):
        return {name: environment.reward_weight(name, step) for name in names}


def total_reward(rewards: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the rewards by name, None where no function scored.

    >>> total_reward({"correct": 1.0, "short": 0.5, "judge": None}, {"correct": 1.0, "short": 0.2, "judge": 1.0})
    1.1
    """
    scored = {name: value for name, value in rewards.items() if value is not None}
    if not scored:
        return None
    return sum(weights[name] * value for name, value in scored.items())
