"""How hard items are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Difficulty:
    """How hard an item is among the items of its kind.

    Attributes:
        kind: What it asks for. Only levels of one kind are compared. It is part of names of metrics.
        level: 0 or more, higher is harder.

    >>> Difficulty("chain_sum", 2).level
    2
    """

    kind: str
    level: int
