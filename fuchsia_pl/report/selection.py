"""The rollouts of a run that its page shows: all, or a fixed sample of whole groups."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fuchsia_pl.report.rows import TRAIN, Key, Row, item_text, key_of, row_of
from fuchsia_pl.report.values import text, whole

MAX_BYTES = 48_000_000  # of the rows before they are compressed: a browser opens that within seconds
EXTREME_SHARE = 20  # the best and the worst groups each have at most a twentieth of the rows
SLACK = 1.1  # so that a sample is taken anew once per many groups
NO_WORD = r"\W+"  # what an address in a link cannot contain as it is
RULE = (
    "all held-out ones of the last evaluation, the groups with the highest and the lowest rewards, and of the others whole "
    "groups by a fixed random choice"
)


@dataclass
class Group:
    """The siblings of an item.

    Attributes:
        key: Split, step, item and environment.
        prompt: Text of the prompt.
        item: The item as JSON.
        rows: Rows of the siblings, by the position of the sibling and the number of the row.

    >>> Group(("train", 1, 5, ""), "2 + 2?", "{}").size
    0
    """

    key: Key
    prompt: str
    item: str
    rows: dict[tuple[int, int], Row] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def siblings(self) -> set[int]:
        """Positions of the siblings."""
        return {sibling for sibling, _ in self.rows}

    @property
    def num_bytes(self) -> int:
        """Size in the page before it is compressed, roughly."""
        return len(self.prompt) + len(self.item) + sum(row.num_bytes for row in self.rows.values())

    @property
    def draw(self) -> int:
        """A number that depends on the key alone and orders groups as if by chance."""
        return int.from_bytes(hashlib.blake2b(repr(self.key).encode(), digest_size=8).digest(), "big")

    @property
    def reward(self) -> float | None:
        """Mean reward; None if no sibling is scored."""
        by_sibling = {row.sibling: row.reward for row in self.rows.values() if row.reward is not None}
        rewards = list(by_sibling.values())
        return sum(rewards) / len(rewards) if rewards else None


class Selection:
    """Takes the lines of a log one by one and keeps the rows that the page shows.

    Which groups are kept depends on the log alone: on the key of a group, its rewards, and whether it is of the last evaluation.

    Args:
        max_rollouts: Largest number of rows.
        max_bytes: Their largest size before compression.

    >>> selection = Selection(max_rollouts=2)
    >>> for item in range(6):
    ...     selection.add({"step": 0, "item_index": item, "sibling": 0, "messages": []}, "train")
    >>> selection.settle()
    >>> len(selection.rows()["rows"]), selection.num_rollouts
    (2, 6)
    """

    def __init__(self, max_rollouts: int, max_bytes: int = MAX_BYTES) -> None:
        self.max_rollouts = max_rollouts
        self.max_bytes = max_bytes
        self.num_rollouts = 0
        self._groups: dict[Key, Group] = {}
        self._open: dict[Key, Group] = {}  # those whose siblings may still come
        self._bound = 1 << 64  # draws from here on were left out before
        self._num_rows = 0
        self._num_bytes = 0

    def add(self, line: Mapping[str, Any], split: str) -> None:
        """Takes a line of the log of a split. The siblings of a group come with other groups of the step in between."""
        key = key_of(line, split)
        if self._open and next(iter(self._open))[:2] != key[:2]:
            self.settle()
        group = self._open.get(key)
        if group is None:
            group = self._groups.pop(key, None)
            if group is not None:
                self._count(group, -1)
        if group is None:
            group = Group(key, text(line.get("prompt")), item_text(line))
        self._open[key] = group
        row = row_of(line, split)
        # A run that continues in its own folder repeats steps: their last rollouts count.
        self.num_rollouts += row.sibling not in group.siblings
        group.rows[row.sibling, row.number] = row

    def add_gaps(self, line: Mapping[str, Any]) -> None:
        """Takes a line of the log of gaps, after the line of its rollout."""
        group = self._groups.get(key_of(line, TRAIN)) or self._open.get(key_of(line, TRAIN))
        place = whole(line.get("sibling")), whole(line.get("row"))
        row = group.rows.get(place) if group is not None else None
        gaps = line.get("gaps")
        if row is not None and isinstance(gaps, list):
            before = row.num_bytes
            row.add_gaps(gaps)
            self._num_bytes += row.num_bytes - before if group is not None and group.key in self._groups else 0

    def settle(self) -> None:
        """Closes the groups whose lines were read, and takes the sample anew if there are far too many rows."""
        for group in self._open.values():
            self._groups[group.key] = group
            self._count(group, +1)
        self._open = {}
        if self._num_rows > SLACK * self.max_rollouts or self._num_bytes > SLACK * self.max_bytes:
            self._sample()

    def rows(self) -> dict[str, Any]:
        """Tables and rows as the page takes them, after the sample is taken."""
        self.settle()
        if self._num_rows > self.max_rollouts or self._num_bytes > self.max_bytes:
            self._sample()
        return _tables([self._groups[key] for key in sorted(self._groups)])

    @property
    def num_shown(self) -> int:
        """Number of rollouts that are kept."""
        return sum(len(group.siblings) for group in self._groups.values())

    @property
    def shown_words(self) -> str:
        """Which of the rollouts are shown, in words."""
        if self.num_shown >= self.num_rollouts:
            return f"all {self.num_rollouts:,} rollouts are shown"
        return f"{self.num_shown:,} of {self.num_rollouts:,} rollouts are shown: {RULE}"

    def _count(self, group: Group, sign: int) -> None:
        self._num_rows += sign * group.size
        self._num_bytes += sign * group.num_bytes

    def _sample(self) -> None:
        """Keeps as many groups as there is room for, in the order of RULE."""
        first, extremes = self._of_last_evaluations(), self._extremes()
        drawn = [key for key, group in self._groups.items() if group.draw < self._bound]
        others = sorted(set(drawn) - first - extremes, key=self._draw)
        kept: dict[Key, Group] = {}
        num_rows = num_bytes = 0
        for key in [*sorted(first, key=self._draw), *sorted(extremes, key=self._draw), *others]:
            group = self._groups[key]
            if num_rows + group.size <= self.max_rollouts and num_bytes + group.num_bytes <= self.max_bytes:
                kept[key] = group
                num_rows, num_bytes = num_rows + group.size, num_bytes + group.num_bytes
            elif key not in first | extremes:
                self._bound = min(self._bound, group.draw)
                break
        self._groups, self._num_rows, self._num_bytes = kept, num_rows, num_bytes

    def _draw(self, key: Key) -> int:
        return self._groups[key].draw

    def _of_last_evaluations(self) -> set[Key]:
        last: dict[str, int] = {}
        for split, step, *_ in self._groups:
            last[split] = max(step, last.get(split, 0))
        return {key for key in self._groups if key[0] != TRAIN and key[1] == last[key[0]]}

    def _extremes(self) -> set[Key]:
        """The trained groups with the highest and the lowest mean rewards."""
        trained = [(group.reward, group) for key, group in self._groups.items() if key[0] == TRAIN]
        scored = [(reward, group.draw, group) for reward, group in trained if reward is not None]
        ascending = [group for *_, group in sorted(scored, key=lambda one: one[:2])]
        return {*self._first_of(ascending), *self._first_of(ascending[::-1])}

    def _first_of(self, groups: list[Group]) -> set[Key]:
        found: set[Key] = set()
        room = self.max_rollouts // EXTREME_SHARE
        for group in groups:
            room -= group.size
            if room < 0:
                break
            found.add(group.key)
        return found


class _Table:
    """Distinct texts and their positions."""

    def __init__(self) -> None:
        self.positions: dict[str, int] = {}

    def at(self, value: str) -> int:
        return self.positions.setdefault(value, len(self.positions))


def _tables(groups: list[Group]) -> dict[str, Any]:
    prompts, items, environments, rewards = _Table(), _Table(), _Table(), _Table()
    rows: list[dict[str, Any]] = []
    for group in groups:
        split, step, item, environment = group.key
        shared = {"prompt": prompts.at(group.prompt), "item_row": items.at(group.item)}
        place = environments.at(environment)
        # Items of several environments have the same positions.
        suffix = f"-{re.sub(NO_WORD, '_', environment)}" if environment else ""
        for name in (name for row in group.rows.values() for name in row.rewards):
            rewards.at(name)
        for (sibling, number), row in sorted(group.rows.items()):
            place_in_group = f"{sibling}.{number}" if number else str(sibling)
            address = {"id": f"{split}-{step}-{item}-{place_in_group}{suffix}", **shared, "environment": place}
            rows.append({**address, **row.fields, "rewards": row.rewards, "token_data": row.token_data})
    names = list(rewards.positions)
    for listed in rows:
        listed["rewards"] = [listed["rewards"].get(name) for name in names]
    return {
        "prompts": list(prompts.positions),
        "items": list(items.positions),
        "environments": list(environments.positions),
        "reward_names": names,
        "rows": rows,
    }
