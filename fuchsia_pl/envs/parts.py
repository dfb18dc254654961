"""Environments that consist of others: a part with its settings, and the items of all parts as one split."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fuchsia_pl.envs.base import Environment, reward_name
from fuchsia_pl.envs.rows import Rows, place_of
from fuchsia_pl.types import Item


@dataclass
class Part:
    """One environment of a mixture.

    Attributes:
        environment: Its items, conversations and rewards.
        weight: Share of the drawn items, relative to the weights of the other parts.
        group_size: Siblings of its items in training; None: `data.sampling.group_size`, which is also the largest value.
        max_turns: Most turns of its rollouts; None: the environment's own number.
        max_completion_tokens: Most tokens that the policy may write in one of its rollouts, in training and on the held-out
            split; None: that of `data.sampling`, which is also the largest value.
    """

    environment: Environment
    weight: float = 1.0
    group_size: int | None = None
    max_turns: int | None = None
    max_completion_tokens: int | None = None


class PartItem(Mapping[str, Any]):
    """An item of a part, with the fields of its row.

    Args:
        part: Name of the part.
        row: The row, exactly as the environment of the part returned it.

    >>> item = PartItem("sums", {"a": 3})
    >>> item == {"a": 3}, item["a"], item.part, item.row
    (True, 3, 'sums', {'a': 3})
    """

    def __init__(self, part: str, row: Item) -> None:
        self.part, self.row = part, row

    def __getitem__(self, key: str) -> Any:
        return self.row[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.row)

    def __len__(self) -> int:
        return len(self.row)


class PartItems(Rows):
    """The items of all parts as one split. Parts alternate, so that the first items of the split have some of every part.

    Args:
        splits: The items of each part, by name.

    >>> items = PartItems({"sums": [{"a": 3}, {"a": 4}], "words": [{"w": "x"}]})
    >>> [(item.part, item.row) for item in items]
    [('sums', {'a': 3}), ('words', {'w': 'x'}), ('sums', {'a': 4})]
    >>> items.part_at(1), items.rows[1], items.where(2)
    ('words', {'w': 'x'}, "item 1 of 'sums'")
    """

    def __init__(self, splits: Mapping[str, Sequence[Item]]) -> None:
        self._names, self._splits = list(splits), list(splits.values())
        self._places = _alternating(tuple(len(items) for items in self._splits))

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int) -> PartItem:
        """The item at an index, with the name of its part."""
        part, place = self._places[index]
        return PartItem(self._names[part], self._splits[part][place])

    def where(self, index: int) -> str:
        """The part of an item and its place there."""
        part, place = self._places[index]
        return f"{place_of(self._splits[part], place)} of {self._names[part]!r}"

    def part_at(self, index: int) -> str:
        """Name of the part that an item belongs to."""
        return self._names[self._places[index][0]]

    @property
    def rows(self) -> "OwnRows":
        """The same items as the environments of the parts returned them."""
        return OwnRows(self)


class OwnRows(Rows):
    """The rows of items of several parts, with the indices of these items.

    Args:
        items: The items.

    >>> OwnRows(PartItems({"sums": [{"a": 3}]}))[0]
    {'a': 3}
    """

    def __init__(self, items: PartItems) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def row(self, index: int) -> Item:
        """The row as its environment returned it."""
        return self._items.row(index).row

    def where(self, index: int) -> str:
        """The part of a row and its place there."""
        return self._items.where(index)


@lru_cache(maxsize=8)  # the splits are asked for in every phase
def _alternating(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Part and place of every item: item i of n stands at (i + 1/2) / n of the whole split."""
    places = [(part, place) for part, size in enumerate(sizes) for place in range(size)]
    return sorted(places, key=lambda one: ((one[1] + 0.5) / sizes[one[0]], one[0]))


def members(environment: Environment) -> list[Environment]:
    """The environments of the parts, or the environment itself if it has no parts."""
    return [part.environment for part in environment.mixed.values()] or [environment]


def by_part(items: Sequence[Item], positions: Sequence[int]) -> dict[str, list[int]]:
    """Positions of items by the name of their part, in the order of the parts' first items; "" for items without parts.

    >>> by_part(PartItems({"sums": [{"a": 3}, {"a": 4}], "words": [{"w": "x"}]}), [0, 1, 2]), by_part([{"a": 3}], [0])
    ({'sums': [0, 2], 'words': [1]}, {'': [0]})
    """
    if not isinstance(items, PartItems):
        return {"": list(positions)}
    found: dict[str, list[int]] = {}
    for position in positions:
        found.setdefault(items.part_at(position), []).append(position)
    return found


def reward_names(environment: Environment) -> list[str]:
    """Names of the reward functions, those of a part as `part/name`."""
    own = [reward_name(function) for function in environment.reward_functions]
    return [
        *own,
        *(f"{name}/{reward}" for name, part in environment.mixed.items() for reward in reward_names(part.environment)),
    ]
