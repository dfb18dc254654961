"""Items of a phase by weight: how many of each part of a mixture, and which.

Nothing is drawn by chance but the order of items: after n drawn items, every part has had its share w n within K / 2 items (K
parts, weights w that add up to 1). So the shares hold over an epoch, and each phase is a function of its number alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from fuchsia_pl.rollouts.addressing import derived_seed, item_indices, refill_indices
from fuchsia_pl.types import ConfigError


@dataclass(frozen=True)
class Pool:
    """The training items of one part.

    Attributes:
        name: Name of the part, "" for an environment without parts.
        weight: Its share, relative to those of the other pools.
        positions: Positions of its items in the split.

    >>> Pool("sums", 2.0, (0, 2)).positions
    (0, 2)
    """

    name: str
    weight: float
    positions: Sequence[int]


def counts(weights: Sequence[float], num_drawn: int) -> list[int]:
    """How many of the first n drawn items are of each part. Every part's number grows by 0 or 1 from n to n + 1.

    The first part gets w_1 n, rounded; the rest is divided among the others by their weights in the same way.

    Args:
        weights: Weights of the parts, above 0.
        num_drawn: n.

    >>> [counts([3.0, 1.0], n) for n in (1, 2, 3, 4, 400)]
    [[1, 0], [2, 0], [2, 1], [3, 1], [300, 100]]
    """
    rest, found = num_drawn, []
    for share in _shares_of_rest(weights):
        found.append(math.floor(share * rest + Fraction(1, 2)))
        rest -= found[-1]
    return found


def counts_between(weights: Sequence[float], first: int, number: int) -> list[int]:
    """How many of `number` drawn items from number `first` on are of each part.

    >>> counts_between([3.0, 1.0], first=2, number=4)
    [3, 1]
    """
    return [
        later - earlier for earlier, later in zip(counts(weights, first), counts(weights, first + number), strict=True)
    ]


def largest_counts(weights: Sequence[float], number: int) -> list[int]:
    """The most items of each part among any `number` items that are drawn one after the other.

    >>> largest_counts([3.0, 1.0], 2), largest_counts([1.0], 8)
    ([2, 1], [8])
    """
    rest, found = number, []
    for share in _shares_of_rest(weights):
        found.append(math.ceil(share * rest))
        rest -= math.floor(share * rest)
    return found


def _shares_of_rest(weights: Sequence[float]) -> list[Fraction]:
    """Weight of each part divided by the weights from it on. Exact: a rounded share would drift over a long run."""
    exact = [Fraction(weight) for weight in weights]
    return [weight / sum(exact[place:]) for place, weight in enumerate(exact)]


def check_pools(pools: Sequence[Pool], batch_size: int) -> None:
    """Checks that no phase needs an item of a part twice.

    Args:
        pools: The parts.
        batch_size: Items of a phase.

    Raises:
        ConfigError: A part has fewer items than a phase may draw of it.
    """
    for pool, needed in zip(pools, largest_counts([pool.weight for pool in pools], batch_size), strict=True):
        if len(pool.positions) < needed:
            raise ConfigError(
                f"the part {pool.name!r} of the mixture has {len(pool.positions)} training items, and by its weight "
                f"{pool.weight:g} a phase of data.batch_size={batch_size} draws up to {needed} of it: lower its weight or "
                "data.batch_size"
            )


def drawn_items(run_seed: int, phase: int, pools: Sequence[Pool], batch_size: int) -> list[int]:
    """Positions of the items of a phase, [batch_size], all different.

    Every part passes over its items again and again, each pass in a new order. Where a phase lies at the turn of two passes, an
    item that it has already is replaced by the next one of the new order.

    Args:
        run_seed: The run's seed.
        phase: Number of the phase.
        pools: The parts, see `check_pools`.
        batch_size: Items of a phase.

    >>> pools = [Pool("sums", 1.0, [0, 2, 4]), Pool("words", 1.0, [1, 3])]
    >>> sorted(drawn_items(0, 0, pools, 4)), len(drawn_items(0, 7, pools, 4))
    ([0, 1, 2, 3], 4)
    """
    if len(pools) == 1:
        (pool,) = pools
        return [pool.positions[i] for i in item_indices(run_seed, phase, len(pool.positions), batch_size)]
    weights = [pool.weight for pool in pools]
    before, found = counts(weights, phase * batch_size), []
    numbers = counts_between(weights, phase * batch_size, batch_size)
    for pool, first, number in zip(pools, before, numbers, strict=True):
        found += _next_of_pool(run_seed, pool, first, number)
    # Ranks and mini-batches take parts of this order, so that each gets a mixture.
    return shuffled(found, run_seed, "mixture", phase)


def spare_items(run_seed: int, phase: int, pools: Sequence[Pool], taken: Sequence[int]) -> list[int]:
    """Positions of all items that a phase has not drawn, in the order in which they may replace others: by weight, too.

    Args:
        run_seed: The run's seed.
        phase: Number of the phase.
        pools: The parts.
        taken: Positions that the phase has drawn.

    >>> spare_items(0, 0, [Pool("sums", 2.0, [0, 1]), Pool("words", 1.0, [2, 3])], taken=[0, 2])
    [1, 3]
    """
    if len(pools) == 1:
        places = {position: place for place, position in enumerate(pools[0].positions)}
        own = [places[position] for position in taken]
        return [pools[0].positions[i] for i in refill_indices(run_seed, phase, len(places), set(own))]
    left = set(taken)
    ordered = [
        ((place + 0.5) / pool.weight, position)
        for pool in pools
        for place, position in enumerate(
            [p for p in shuffled(pool.positions, run_seed, "refill", pool.name, phase) if p not in left]
        )
    ]
    return [position for _, position in sorted(ordered, key=lambda one: one[0])]


def shuffled(positions: Sequence[int], *address: int | str) -> list[int]:
    """The positions in an order that is a function of the address.

    >>> sorted(shuffled([4, 7, 9], 0, "mixture", 3))
    [4, 7, 9]
    """
    generator = torch.Generator().manual_seed(derived_seed(*address))
    return [positions[i] for i in torch.randperm(len(positions), generator=generator).tolist()]


def _next_of_pool(run_seed: int, pool: Pool, first: int, number: int) -> list[int]:
    """The drawn items `first` to `first + number - 1` of a part, all different."""
    if number == 0:
        return []
    number_of_pass, offset = divmod(first, len(pool.positions))
    found = shuffled(pool.positions, run_seed, "order", pool.name, number_of_pass)[offset : offset + number]
    if len(found) < number:
        following = shuffled(pool.positions, run_seed, "order", pool.name, number_of_pass + 1)
        found += [position for position in following if position not in found][: number - len(found)]
    return found
