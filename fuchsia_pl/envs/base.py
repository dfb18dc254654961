"""Environments: where questions come from, what happens to an answer, and what it is worth."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence

from fuchsia_pl.types import ConfigError, Item, Message, Rollout

Rewards = list[float] | list[float | None]
RewardFunction = Callable[..., Rewards | Awaitable[Rewards]]


class Environment(ABC):
    """Configured once from YAML; each rollout of it has a `Rollout` of its own as its state.

    Attributes:
        reward_functions: Each is `f(rollouts, *args, **kwargs) -> list[float]`, sync or async, called once per group of
            siblings; None in place of a number means that it does not score that rollout. Its name in logs is its `__name__`.
        reward_weights: Weight of each reward function by name in the total, 1.0 where not given.
        stop: Strings after which the policy stops writing.
        timeout_s: Bound of each call of a reward function and of `step_rollout`.
    """

    def __init__(self) -> None:
        self.reward_functions: list[RewardFunction] = []
        self.reward_weights: dict[str, float] = {}
        self.stop: list[str] = []
        self.timeout_s = 60.0

    @abstractmethod
    def train_items(self) -> Sequence[Item]:
        """The rows that training draws from."""

    @abstractmethod
    def validation_items(self) -> Sequence[Item]:
        """The held-out rows, which training never draws."""

    @abstractmethod
    def messages(self, item: Item) -> list[Message]:
        """The conversation that the policy is asked to continue, as `{"role": …, "content": …}`."""

    @abstractmethod
    def step_rollout(self, rollout: Rollout) -> Awaitable[None] | None:
        """Reacts to the newest turn and ends the interaction with `rollout.finish()`. Sync or async; a sync one gets a thread."""

    def is_correct(self, rollout: Rollout) -> bool:
        """Whether a scored rollout counts as right in `accuracy`: by default, 1.0 or more from the first reward function."""
        reward = rollout.rewards[reward_name(self.reward_functions[0])]
        return reward is not None and reward >= 1.0


class SingleTurnEnvironment(Environment):
    """One question, one answer."""

    def step_rollout(self, rollout: Rollout) -> None:
        """Ends the interaction after the first answer."""
        rollout.finish()


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
        ConfigError: No reward function, two of one name, or a weight for a name that none has.
    """
    kind = type(environment).__name__
    names = [reward_name(function) for function in environment.reward_functions]
    if not names:
        raise ConfigError(f"{kind}.reward_functions is empty: without a reward there is nothing to learn")
    if len(set(names)) < len(names):
        raise ConfigError(
            f"{kind}.reward_functions has two functions of one name in {names}: rewards are logged by name"
        )
    unknown = sorted(set(environment.reward_weights) - set(names))
    if unknown:
        raise ConfigError(f"{kind}.reward_weights has {unknown}; the reward functions are {names}")


def total_reward(rewards: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the rewards by name, None where no function scored.

    >>> total_reward({"correct": 1.0, "short": 0.5, "judge": None}, {"short": 0.2})
    1.1
    """
    scored = {name: value for name, value in rewards.items() if value is not None}
    if not scored:
        return None
    return sum(weights.get(name, 1.0) * value for name, value in scored.items())
