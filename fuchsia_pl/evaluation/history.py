"""Metrics of the first and the newest steps of a run, on which the detectors of `health` decide."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, float]

REWARD = "reward/mean"
ACCURACY = "rollout/accuracy"
TRUNCATED = "rollout/truncated_fraction"
LENGTH = "rollout/completion_tokens"
STALENESS = "rollout/staleness"
KL = "train/kl"
GAP = "train/logprob_gap"
ENTROPY = "train/entropy"
CLIPPED = "train/clip_fraction"
WATCHED = (REWARD, ACCURACY, TRUNCATED, LENGTH, STALENESS, KL, GAP, ENTROPY, CLIPPED)
# Computed from other metrics of the step; their values are not logged.
EQUAL_GROUPS = "equal_groups"  # share of the sampled groups whose rewards are equal
STALE_ROWS = "stale_rows"  # share of the step's rows that were dropped as too old
SPREAD = "spread/"  # + reward: its share of the spread within groups
VARYING = "varying/"  # + reward: share of the groups in which it varies
TINY = 1e-6  # rewards that differ by less are equal, as in `rollout/zero_variance_groups`


def step_row(metrics: Mapping[str, float], num_groups: int, num_rows: int) -> Row:
    """The watched metrics of one optimizer step, without values that are missing or not finite.

    A skipped step computes nothing on tokens. Its `train/` metrics are sums over no tokens, and are left out.

    Args:
        metrics: Metrics of the step, by name.
        num_groups: Groups that a phase samples first, over all ranks, without refills.
        num_rows: Rollouts of these groups.

    >>> step_row({"train/skipped": 1.0, "train/entropy": 0.0, "rollout/zero_variance_groups": 4.0}, 4, 32)
    {'equal_groups': 1.0}
    """
    is_skipped = metrics.get("train/skipped", 0.0) > 0.0
    row = {name: float(metrics[name]) for name in WATCHED if name in metrics}
    if "rollout/zero_variance_groups" in metrics:
        sampled = num_groups + metrics.get("rollout/refilled_groups", 0.0)
        row[EQUAL_GROUPS] = metrics["rollout/zero_variance_groups"] / sampled
    if "rollout/stale" in metrics:
        row[STALE_ROWS] = metrics["rollout/stale"] / num_rows
    return {
        name: value
        for name, value in row.items()
        if math.isfinite(value) and not (is_skipped and name.startswith("train/"))
    }


def reward_spreads(groups: Iterable[Sequence[Mapping[str, float | None]]], weight: Callable[[str], float]) -> Row:
    """What each reward contributes to the differences between siblings, which are all that an advantage is made of.

    Args:
        groups: Rewards of the siblings of each group, by name; None where a reward function gave none.
        weight: Weight of a reward in the total, by name.

    Returns:
        For each reward its share of the sum of all weighted standard deviations within groups (`spread/<name>`), and the share of
        the groups in which it varies (`varying/<name>`). Empty if no reward varies in any group.

    >>> group = [{"right": 1.0, "form": 0.5}, {"right": 0.0, "form": 0.5}]
    >>> reward_spreads([group], weight=lambda name: 1.0)
    {'spread/right': 1.0, 'varying/right': 1.0, 'spread/form': 0.0, 'varying/form': 0.0}
    """
    spreads: dict[str, list[float]] = {}
    for group in groups:
        for name in group[0]:
            values = [value for rewards in group if (value := rewards.get(name)) is not None and math.isfinite(value)]
            spreads.setdefault(name, []).append(statistics.pstdev(values) if len(values) > 1 else 0.0)
    weighted = {name: abs(weight(name)) * sum(found) for name, found in spreads.items()}
    total = sum(weighted.values())
    row: Row = {}
    for name, found in spreads.items() if total > 0.0 else ():
        is_used = weight(name) != 0.0
        row[SPREAD + name] = weighted[name] / total
        row[VARYING + name] = sum(is_used and spread > TINY for spread in found) / len(found)
    return row


class History:
    """Rows of the first and of the newest optimizer steps. Its figures are medians over windows, so single steps do not matter.

    Args:
        window: Optimizer steps of a window.
        flat_steps: Number of newest steps that are kept; at least two windows are.

    >>> history = History(window=2, flat_steps=4)
    >>> for value in (1.0, 1.0, 2.0, 9.0, 3.0, 5.0):
    ...     history.add({"train/kl": value})
    >>> history.at_start("train/kl"), history.before("train/kl"), history.now("train/kl"), history.num_steps
    (1.0, 5.5, 4.0, 6)
    """

    def __init__(self, window: int, flat_steps: int) -> None:
        self.window = window
        self.flat_steps = flat_steps
        self.num_steps = 0
        self._first: list[Row] = []
        self._newest: list[Row] = []

    def add(self, row: Row) -> None:
        """Adds the row of the next optimizer step."""
        self.num_steps += 1
        if len(self._first) < self.window:
            self._first.append(row)
        self._newest = [*self._newest, row][-max(self.flat_steps, 2 * self.window) :]

    def newest(self, name: str, number: int) -> list[float]:
        """Values of a metric in the newest steps. Empty if there were fewer steps, or if half of them lack the metric."""
        return _values(self._newest[-number:], name, number)

    def now(self, name: str) -> float | None:
        """Median over the newest window."""
        return _median(self.newest(name, self.window))

    def before(self, name: str) -> float | None:
        """Median over the window before the newest."""
        return _median(_values(self._newest[-2 * self.window : -self.window], name, self.window))

    def at_start(self, name: str) -> float | None:
        """Median over the first window of the run; None while it overlaps the newest."""
        return _median(_values(self._first, name, self.window)) if self.num_steps >= 2 * self.window else None

    def names(self, prefix: str) -> list[str]:
        """Rest of the names that begin with a prefix, in the newest window."""
        rows = self._newest[-self.window :]
        return sorted({name.removeprefix(prefix) for row in rows for name in row if name.startswith(prefix)})

    def state_dict(self) -> dict[str, Any]:
        """The rows, as plain data."""
        return {"num_steps": self.num_steps, "first": list(self._first), "newest": list(self._newest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with the rows of another history. If their windows differ in length, it starts from the newest rows."""
        first = [dict(row) for row in state["first"]]
        self._newest = [dict(row) for row in state["newest"]][-max(self.flat_steps, 2 * self.window) :]
        is_same = len(first) == self.window or state["num_steps"] < self.window
        self._first = first if is_same else self._newest[: self.window]
        self.num_steps = int(state["num_steps"]) if is_same else len(self._newest)


def _values(rows: Sequence[Row], name: str, number: int) -> list[float]:
    values = [row[name] for row in rows if name in row]
    return values if len(rows) == number and 2 * len(values) > number else []


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
