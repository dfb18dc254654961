"""Which items a phase draws, and which may replace groups without spread."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.parts import by_part
from fuchsia_pl.rollouts.ranks import Ranks
from fuchsia_pl.rollouts.shares import Pool, check_pools, drawn_items, spare_items
from fuchsia_pl.samples import RolloutGroup
from fuchsia_pl.types import Item

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Items of a phase, over all ranks.

    Attributes:
        drawn: Positions of the items, [batch_size], all different.
        spare: Positions of the items that may replace groups without spread, in order.
        metrics: Figures of the choice, the same on all ranks.

    >>> Choice(drawn=[3, 1], spare=[]).metrics
    {}
    """

    drawn: list[int]
    spare: list[int]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PhaseSizes:
    """Settings of a run that every choice depends on.

    Attributes:
        run_seed: The run's seed.
        batch_size: Items of a phase, over all ranks.
        has_spare: Whether groups without spread are replaced.
        num_ahead: Phases that are sampled before they are needed.

    >>> PhaseSizes(run_seed=0, batch_size=8).num_ahead
    0
    """

    run_seed: int
    batch_size: int
    has_spare: bool = False
    num_ahead: int = 0


class Chooser:
    """Draws all items equally often; those of a mixture by the weights of its parts. It has no state.

    Args:
        pools: The training items of each part.
        sizes: Settings of the run.

    Raises:
        ConfigError: A part has fewer items than a phase may draw of it.

    >>> Chooser([Pool("", 1.0, [5, 6, 7])], PhaseSizes(run_seed=0, batch_size=3)).choice(phase=0).spare
    []
    """

    def __init__(self, pools: Sequence[Pool], sizes: PhaseSizes) -> None:
        if len(pools) > 1:
            check_pools(pools, sizes.batch_size)
        self.pools = pools
        self.sizes = sizes

    def plan(self, phase: int) -> None:
        """Called before a phase is taken, and before any phase that may be sampled beside it has started."""

    def choice(self, phase: int) -> Choice:
        """The items of a phase, which was planned."""
        sizes = self.sizes
        drawn = drawn_items(sizes.run_seed, phase, self.pools, sizes.batch_size)
        spare = spare_items(sizes.run_seed, phase, self.pools, drawn) if sizes.has_spare else []
        return Choice(drawn, spare)

    def observe(self, phase: int, groups: Sequence[RolloutGroup], ranks: Ranks) -> None:
        """Called with this rank's groups of a phase that was taken. All ranks call it at the same time."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the number of its phase."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        if state_dict:
            logger.warning("the checkpoint's curriculum is not used: data.sampling.curriculum is null")


def pools_of(environment: Environment, items: Sequence[Item], fitting: Sequence[int]) -> list[Pool]:
    """The training items of each part; one pool for an environment without parts.

    Args:
        environment: The environment.
        items: Its training items.
        fitting: Positions of those whose prompts are short enough.
    """
    positions = by_part(items, fitting)
    if not environment.mixed:
        return [Pool("", 1.0, list(fitting))]
    return [Pool(name, part.weight, positions.get(name, [])) for name, part in environment.mixed.items()]
