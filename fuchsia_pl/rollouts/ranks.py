"""The ranks of a run, without the trainer: the number of this rank, and reductions over all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning.pytorch import Trainer
from torch import Tensor

How = Literal["sum", "min", "max"]


@dataclass(frozen=True)
class Ranks:
    """This rank and the others.

    Attributes:
        rank: Number of this rank.
        size: Number of ranks.
        reduce: Reduces a tensor over all ranks. All ranks have to call it at the same time.

    >>> Ranks(rank=1, size=2, reduce=lambda values, how: values).share([4, 7, 9, 11])
    [7, 11]
    """

    rank: int
    size: int
    reduce: Callable[[Tensor, How], Tensor]

    def share(self, indices: list[int]) -> list[int]:
        """This rank's part of some positions."""
        return indices[self.rank :: self.size]

    def add_up(self, values: Tensor) -> Tensor:
        """Sum over all ranks, on the CPU."""
        return self.reduce(values, "sum")

    def lowest(self, values: Tensor) -> Tensor:
        """Minimum over all ranks, on the CPU."""
        return self.reduce(values, "min")

    def highest(self, values: Tensor) -> Tensor:
        """Maximum over all ranks, on the CPU."""
        return self.reduce(values, "max")


def ranks_of(trainer: Trainer) -> Ranks:
    """The ranks of a trainer."""
    strategy = trainer.strategy

    def reduce(values: Tensor, how: How) -> Tensor:
        # Some strategies reduce in place.
        return strategy.reduce(values.clone().to(strategy.root_device), reduce_op=how).cpu()

    return Ranks(trainer.global_rank, trainer.world_size, reduce)
