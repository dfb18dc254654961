"""Rewards and metrics of a taskset as reward functions. Those of a finished episode are numbers in `Rollout.state`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fuchsia_pl.envs import ConfigError, RewardFunction, Rollout, RunEndingConfigError

SCORES = "verifiers_scores"  # key in `Rollout.state`


@dataclass(frozen=True)
class Signals:
    """Names of what a taskset scores.

    Attributes:
        rewards: Weight of each reward and judge, by name.
        metrics: Names of the metrics, which have no weight.
        recorded: Names of rewards that the environment records itself, or that a reward returns by key. They bring their weight.

    Raises:
        ConfigError: A name occurs twice.

    >>> Signals({"lcs": 0.5}, ["length"], ["won"]).weights()
    {'won': 1.0, 'lcs': 0.5, 'length': 0.0}
    """

    rewards: Mapping[str, float]
    metrics: Sequence[str]
    recorded: Sequence[str]

    def __post_init__(self) -> None:
        """Checks that each name has one meaning."""
        names = [*self.recorded, *self.rewards, *self.metrics]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"the taskset of verifiers has several rewards, metrics or recorded rewards named {twice}"
            )

    def weights(self) -> dict[str, float]:
        """Weight of each reward function, by name. The first one decides which rollout is correct."""
        return {**dict.fromkeys(self.recorded, 1.0), **self.rewards, **dict.fromkeys(self.metrics, 0.0)}

    def values(self, rewards: Mapping[str, tuple[float, float]], metrics: Mapping[str, float]) -> dict[str, float]:
        """Value of each reward function for a finished episode.

        Args:
            rewards: Score and weight of each recorded reward, by name.
            metrics: Recorded metrics, by name.

        Raises:
            RunEndingConfigError: A recorded reward has no reward function. Were its episodes only unscored, an environment that
                records a reward for success alone would lose its successes.

        >>> Signals({"lcs": 0.5}, ["length"], ["won"]).values({"lcs": (0.8, 0.5), "won": (1.0, 2.0)}, {"length": 7.0})
        {'lcs': 0.8, 'won': 2.0, 'length': 7.0}
        """
        unknown = sorted(set(rewards) - {*self.rewards, *self.recorded})
        if unknown:
            raise RunEndingConfigError(
                f"the episode has the rewards {unknown} beside those of the task's class: name them in "
                "data.environment.init_args.recorded"
            )
        own = {name: score * (1.0 if name in self.rewards else weight) for name, (score, weight) in rewards.items()}
        return {**own, **{name: value for name, value in metrics.items() if name in self.metrics}}


def reward_function(name: str) -> RewardFunction:
    """The reward function of this name: what the taskset scored under it, None if it did not.

    >>> reward_function("lcs").__name__
    'lcs'
    """

    def read(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float | None]:
        return [rollout.state[SCORES].get(name) for rollout in rollouts]

    read.__name__ = name
    return read
