"""Addressed randomness: the items of a step and the seed of each request are functions of their position in the run.

There is no state. A rollout can be repeated, a run resumed, and the number of ranks changed, with the same samples.
"""

import hashlib
from collections.abc import Collection

import torch

from fuchsia_pl.types import ConfigError


def derived_seed(*address: int | str) -> int:
    """A seed in [0, 2**63) from an address such as (run seed, "train", step, item, sibling).

    >>> derived_seed(0, "train", 3, 17, 0) == derived_seed(0, "train", 3, 17, 0) != derived_seed(0, "train", 3, 17, 1)
    True
    """
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def item_indices(run_seed: int, step: int, num_items: int, batch_size: int) -> list[int]:
    """The items of one step. Each pass over the data has a new order, which is cut into steps; the remainder is not used.

    Args:
        run_seed: The run's seed.
        step: The optimizer step.
        num_items: Rows of the split.
        batch_size: Items of a step.

    Returns:
        Distinct positions, [batch_size].

    Raises:
        ConfigError: There are fewer items than `batch_size`.

    >>> sorted(item_indices(0, step=0, num_items=4, batch_size=2) + item_indices(0, step=1, num_items=4, batch_size=2))
    [0, 1, 2, 3]
    """
    if num_items < batch_size:
        raise ConfigError(
            f"the environment has {num_items} training items, fewer than data.batch_size={batch_size}: lower data.batch_size"
        )
    steps_per_pass = num_items // batch_size
    generator = torch.Generator().manual_seed(derived_seed(run_seed, "order", step // steps_per_pass))
    start = (step % steps_per_pass) * batch_size
    return torch.randperm(num_items, generator=generator)[start : start + batch_size].tolist()


def refill_indices(run_seed: int, step: int, num_items: int, taken: Collection[int]) -> list[int]:
    """The items that may replace groups without spread, in order: all items that the step has not drawn.

    Args:
        run_seed: The run's seed.
        step: The step.
        num_items: Rows of the split.
        taken: Positions that the step has drawn.

    >>> sorted(refill_indices(0, step=3, num_items=5, taken=[1, 4]))
    [0, 2, 3]
    """
    generator = torch.Generator().manual_seed(derived_seed(run_seed, "refill", step))
    return [index for index in torch.randperm(num_items, generator=generator).tolist() if index not in taken]
