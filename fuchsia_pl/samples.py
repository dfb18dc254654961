"""Scored rollouts: groups, the rows that are trained on, and evaluations.

Shape letters: G siblings of a group, A sampled tokens of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fuchsia_pl.types import Rollout, Row


@dataclass(frozen=True)
class RolloutGroup:
    """The G siblings of one item.

    Attributes:
        rollouts: The siblings, in order. Length [G].
        has_spread: Whether the siblings' rewards differ.

    >>> RolloutGroup(rollouts=(), has_spread=False).has_spread
    False
    """

    rollouts: tuple[Rollout, ...]
    has_spread: bool


@dataclass(frozen=True)
class Sample:
    """One trainable row: a row of a rollout with the advantage of each of its sampled tokens.

    Attributes:
        rollout: The rollout.
        advantages: One per sampled token. Length [A].
        old_values: Critic values before the update, one per sampled token, None without a critic. Length [A].
        value_targets: Targets of the critic values, None without a critic. Length [A].
        row_number: Which of the rollout's rows it is; -1 is the last.

    >>> rollout = Rollout({}, item_index=0, sibling=1, temperature=1.0, prompt="")
    >>> Sample(rollout, advantages=(-0.5, -0.9)).mean_advantage
    -0.7
    """

    rollout: Rollout
    advantages: tuple[float, ...]
    old_values: tuple[float, ...] | None = None
    value_targets: tuple[float, ...] | None = None
    row_number: int = -1

    @property
    def row(self) -> Row:
        """The row."""
        return self.rollout.rows[self.row_number]

    @property
    def is_first(self) -> bool:
        """Whether it is the first trainable row of its rollout. Each rollout with sampled tokens has exactly one."""
        return not any(row.num_sampled_tokens for row in self.rollout.rows[: self.row_number])

    @property
    def mean_advantage(self) -> float:
        """Mean over the sampled tokens, for logs."""
        return sum(self.advantages) / max(len(self.advantages), 1)


@dataclass(frozen=True)
class Evaluation:
    """Rollouts and metrics of one pass over a held-out split.

    >>> Evaluation(rollouts=(), metrics={"accuracy": 0.5}).metrics["accuracy"]
    0.5
    """

    rollouts: tuple[Rollout, ...]
    metrics: Mapping[str, float]
