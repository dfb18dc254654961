"""Environments: the source of items, the interaction with the policy, and the rewards."""

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fuchsia_pl.envs.conversation import prompt_messages
from fuchsia_pl.envs.difficulty import Difficulty
from fuchsia_pl.envs.items import ItemSource, load_items
from fuchsia_pl.envs.table_rows import CSV_TYPES
from fuchsia_pl.envs.thinking import THINKING_MARKS, check_marks
from fuchsia_pl.envs.tools.convention import PLAIN, ToolConvention
from fuchsia_pl.envs.tools.spec import ToolSpec
from fuchsia_pl.envs.user_code import user_code
from fuchsia_pl.types import ConfigError, Item, Message, Rollout

if TYPE_CHECKING:
    from fuchsia_pl.envs.audit.task import AuditTask  # it imports this file
    from fuchsia_pl.envs.parts import Part

Rewards = list[float] | list[float | None] | list[list[float]] | list[list[float] | None]
RewardFunction = Callable[..., Rewards | Awaitable[Rewards]]
# Optional attributes of a reward function: the names that it counts under in `Rollout.counts`, a function that loads what it
# needs before the engine starts, one that closes it, a check of an item's gold answer, a function that reads the answer of a
# rollout, one that returns its memory on a GPU in GiB, and the time limit of a call in seconds, if its own limits need more than
# the environment's `timeout_s`.
COUNTERS = "counters"
PREPARE = "prepare"
CLOSE = "close"
CHECK_GOLD = "check_gold"
ANSWER = "answer"
DEVICE_GB = "device_gb"
MIN_TIMEOUT_S = "min_timeout_s"
NONE_UNSCORES = "none_unscores"
PREPARE_TIMEOUT_S = 1800.0


class Environment(ABC):
    """Base class of environments. It is configured once from YAML; the state of each interaction is a `Rollout`.

    Args:
        dataset: Dataset on the hub, such as "openai/gsm8k". An environment that generates its items overrides `train_items`.
        dataset_config: Configuration of the hub dataset, such as "main".
        train_split: Split of the hub dataset to train on.
        validation_split: Held-out split of the hub dataset.
        train_file: Local files instead of the hub: one, several, or a pattern such as "data/*.jsonl". JSON lines, a JSON array,
            CSV, Parquet, or a folder written by `save_to_disk` of `datasets`; gzip is supported.
        validation_file: Local files of the held-out split.
        prompt_field: Field of an item that holds the prompt: a text, or a list of messages.

    Attributes:
        reward_functions: Each is `f(rollouts, *args, **kwargs) -> list[float]`, sync or async, called once per group of
            siblings. None instead of a number leaves that rollout without a score by this function; one without any score, or
            without that of a function whose attribute `none_unscores` is True, is not trained on. A list instead of a number
            scores the turns of the policy, one number per turn; the rollout's reward is their sum. Its name in logs is its
            `__name__`.
        reward_weights: Weight of each reward function in the total, by name; 1.0 by default.
        initial_reward_weights: Weights at step 0, by name; they change linearly to `reward_weights`.
        ramp_steps: Optimizer step at which `reward_weights` are reached.
        csv_types: Types of the columns of CSV files by name: "int", "float", "bool", "json". Other columns are text.
        stop: Strings after which a turn ends, except inside thinking or inside the JSON of a tool call.
        max_steps: Maximum number of turns in one rollout.
        max_rows: Maximum number of rows of one rollout, see `Rollout.branch`. The memory of a step is planned for it.
        timeout_s: Time limit in seconds of each call of a reward function or of a method of the environment.
        on_error: Effect of an exception in a reward function or in `step_rollout`. "stop" ends the run and names the item and
            the cause. "unscored" counts it and excludes the rollout (for a reward function: the group) from training. A
            `RunEndingConfigError` ends the run in either case.
        max_response_chars: Maximum number of characters of one `rollout.respond`. The middle of a longer text is replaced by a
            note with the number of omitted characters, before the text is encoded (encoding megabytes takes seconds).
        counters: Names of the environment's counters, see `Rollout.counts`.
        tools: Tools that the policy may call; set by `prepare`.
        tool_convention: Format in which the model writes tool calls; set before the first rollout.
        thinking_marks: Pairs of marks that enclose reasoning, which is neither an answer nor a tool call. Empty: none.
        mixed: The parts of an environment that consists of others, by name; else empty. Each rollout is run, scored and judged by
            the environment of its part.
    """

    max_steps = 1
    max_rows = 1

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
        self.mixed: Mapping[str, Part] = {}

    if not TYPE_CHECKING:  # a type checker would otherwise accept every misspelt attribute

        def __getattr__(self, name: str) -> Any:
            """Distinguishes a constructor that does not call the base class from a misspelt attribute."""
            if name in _set_by_constructor():
                raise ConfigError(_lacks_constructor(self))
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def train_items(self) -> Sequence[Item]:
        """The items of the training split."""
        return self._items("train")

    def validation_items(self) -> Sequence[Item]:
        """The items of the held-out split, which is never trained on."""
        return self._items("validation")

    def messages(self, item: Item) -> list[Message]:
        """The prompt of an item, as messages `{"role": …, "content": …}`.

        By default it is the item's `prompt_field`: a text becomes one user message, a list of messages is used as it is.

        Raises:
            ConfigError: The field is missing, null, empty, or of another type.
        """
        return prompt_messages(item, self.prompt_field)

    def gold_turns(self, item: Item) -> list[str] | None:
        """The turns of a perfect policy; None if they are not known. `fuchsia check-env` plays them."""
        return None

    def check_gold(self, item: Item) -> str | None:
        """Describes the fault of an item's gold answer; None if the reward functions can use it.

        `fuchsia check-env` and the start of `fuchsia fit` call it for every item, so that no gold answer ends a run later.
        By default it calls the `check_gold(item)` of each reward function that has one.
        """
        checks = [getattr(function, CHECK_GOLD) for function in self.reward_functions if hasattr(function, CHECK_GOLD)]
        return next((problem for check in checks if (problem := check(item)) is not None), None)

    def difficulty(self, item: Item) -> Difficulty | None:
        """Kind and level of an item, for a curriculum by level; None if it has no level."""
        return None

    def audit_tasks(self, all_tasks: bool) -> "Sequence[AuditTask]":
        """The tasks whose rewards `fuchsia check-env` audits one by one; none by default, so that it audits the whole.

        Args:
            all_tasks: Whether to return every task that the environment could be configured with, or only the configured ones.
        """
        return ()

    async def prepare(self) -> None:
        """Called before every batch of rollouts. Starts resources that are not running, such as tool servers."""

    async def close(self) -> None:
        """Releases the resources of `prepare` and of the reward functions. Called once, also after an error."""
        for function in self.reward_functions:
            if hasattr(function, CLOSE):
                getattr(function, CLOSE)()

    async def open_rollout(self, rollout: Rollout) -> None:
        """Called at the start of a rollout."""

    @abstractmethod
    def step_rollout(self, rollout: Rollout) -> Awaitable[None] | None:
        """Handles the newest turn: `rollout.respond(text)` continues the interaction, `rollout.finish()` ends it.

        Sync or async. A sync method runs in a thread, so that it blocks only its own rollout.
        """

    async def close_rollout(self, rollout: Rollout) -> None:
        """Called after a rollout has ended for any reason, before it is scored."""

    @property
    def step_timeout_s(self) -> float:
        """Time limit in seconds of one call of `step_rollout`."""
        return self.timeout_s

    @property
    def prepare_timeout_s(self) -> float:
        """Time limit in seconds of one call of `prepare`. Override it if loading takes longer."""
        return PREPARE_TIMEOUT_S

    def prepare_rewards(self) -> None:
        """Calls the `prepare` of each reward function that has one. Called in a thread after every `prepare`."""
        for function in self.reward_functions:
            if hasattr(function, PREPARE):
                getattr(function, PREPARE)()

    def rewards_gb(self, device_index: int | None) -> float:
        """Memory of the reward functions on a GPU, in GiB; 0 without a GPU.

        Args:
            device_index: Index of the GPU.
        """
        held = [getattr(function, DEVICE_GB) for function in self.reward_functions if hasattr(function, DEVICE_GB)]
        return 0.0 if device_index is None else sum(function(device_index) for function in held)

    def counter_names(self) -> list[str]:
        """Allowed keys of `Rollout.counts`: `counters` and those of the reward functions."""
        own = (getattr(function, COUNTERS, ()) for function in self.reward_functions)
        return [*self.counters, *(name for names in own for name in names)]

    def reward_weight(self, name: str, step: int | None) -> float:
        """Weight of a reward function at an optimizer step; step None (held-out rollouts) gets the final weight."""
        last = self.reward_weights.get(name, 1.0)
        first = self.initial_reward_weights.get(name, last)
        done = 1.0 if step is None or step >= self.ramp_steps else step / self.ramp_steps
        return first * (1.0 - done) + last * done

    def is_correct(self, rollout: Rollout) -> bool:
        """Whether a scored rollout counts as correct in `accuracy`; by default, a first reward of 1.0 or more."""
        reward = rollout.rewards[reward_name(self.reward_functions[0])]
        return reward is not None and reward >= 1.0

    def answer(self, rollout: Rollout) -> str | None:
        """The answer of a rollout, for the vote of maj@k; None if it gives none. Equal answers must be equal texts.

        By default it is what the first reward function that has an `answer(rollout)` reads, as those of `envs.rewards` have.
        Without one, it is the last `<answer>…</answer>` or the last complete box of the last turn, without its thinking.
        """
        from fuchsia_pl.envs.answers import stated_answer  # its rewards import this file

        return stated_answer(rollout, self.reward_functions)

    def _items(self, split: str) -> Sequence[Item]:
        if split not in self._loaded:
            self._loaded[split] = load_items(type(self).__name__, split, self._sources[split], self.csv_types)
        return self._loaded[split]


class SingleTurnEnvironment(Environment):
    """An environment with one turn per rollout."""

    def step_rollout(self, rollout: Rollout) -> None:
        """Ends the interaction after the first turn."""
        rollout.finish()


class MultiTurnEnvironment(Environment):
    """An environment with several turns. Override `step_rollout`; set `max_steps`, `stop` and `reward_functions`.

    A rollout that has not finished after `max_steps` turns is truncated.
    """

    max_steps = 8


def reward_name(function: RewardFunction) -> str:
    """The name of a reward function in logs and in `reward_weights`.

    Raises:
        ConfigError: It has none, for example a functools.partial.

    >>> def correct(rollouts): ...
    >>> reward_name(correct)
    'correct'
    """
    name = function.__name__ if hasattr(function, "__name__") else ""
    if not name or name == "<lambda>":
        raise ConfigError(f"the reward function {function!r} has no name for logs: define it with `def`")
    return name


def check_environment(environment: Environment) -> None:
    """Checks the attributes of an environment.

    Raises:
        ConfigError: The constructor does not call the base class, two reward functions have the same name, a weight is not
            finite or has an unknown name, or a setting has a value that is not allowed.
    """
    kind = type(environment).__name__
    if not _set_by_constructor() <= set(vars(environment)):
        raise ConfigError(_lacks_constructor(environment))
    names = [reward_name(function) for function in environment.reward_functions]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"{kind}.reward_functions has two functions with the same name in {names}: rewards are logged by name"
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
    if environment.max_rows < 1:
        raise ConfigError(f"{kind}.max_rows must be 1 or more, got {environment.max_rows}")
    limit = environment.max_response_chars
    if not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"{kind}.max_response_chars must be a whole number, 1 or more, got {limit!r}")
    if environment.timeout_s <= 0:
        raise ConfigError(f"{kind}.timeout_s must be above 0, got {environment.timeout_s}")
    check_marks(environment.thinking_marks)


def check_rewards(environment: Environment) -> None:
    """Checks that an environment has rewards, which all commands but `predict` and `chat` need.

    Raises:
        ConfigError: There is no reward function.
    """
    kind = type(environment).__name__
    if not environment.reward_functions and not environment.mixed:
        raise ConfigError(
            f"{kind}.reward_functions is empty: without a reward there is nothing to learn. Set it in {kind}.__init__, after "
            "super().__init__()"
        )


def _set_by_constructor() -> set[str]:
    """Checks that the constructor of the base class was called."""
    return set(vars(SingleTurnEnvironment()))


def _lacks_constructor(environment: Environment) -> str:
    kind = type(environment).__name__
    return f"{kind}.__init__ does not call super().__init__(), which sets required attributes: call it first"


def is_finite_number(value: object) -> bool:
    """Whether a value is a finite number that fits into a float.

    >>> is_finite_number(1), is_finite_number(True), is_finite_number("1"), is_finite_number(10**400)
    (True, True, False, False)
    """
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except Exception:  # a tensor with several values, or an object of user code, may raise any exception
        return False


def weights_at(environment: Environment, step: int | None) -> dict[str, float]:
    """Weights of all reward functions at a step, by name; those of a part of a mixture as `part/name`."""
    names = [reward_name(function) for function in environment.reward_functions]
    with user_code(f"{type(environment).__name__}.reward_weight"):
        found = {name: environment.reward_weight(name, step) for name in names}
    for name, part in environment.mixed.items():
        found |= {f"{name}/{reward}": weight for reward, weight in weights_at(part.environment, step).items()}
    return found


def total_reward(rewards: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """Weighted sum of the rewards; None if no function scored.

    >>> total_reward({"correct": 1.0, "short": 0.5, "judge": None}, {"correct": 1.0, "short": 0.2, "judge": 1.0})
    1.1
    """
    scored = {name: value for name, value in rewards.items() if value is not None}
    if not scored:
        return None
    return sum(weights[name] * value for name, value in scored.items())
