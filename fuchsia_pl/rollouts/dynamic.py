"""Dynamic sampling: groups without spread are replaced by other items, a bounded number of times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fuchsia_pl.rollouts.collector import Collector, Draw, counted
from fuchsia_pl.rollouts.credit import make_groups
from fuchsia_pl.samples import RolloutGroup
from fuchsia_pl.types import Rollout


@dataclass(frozen=True)
class Sampled:
    """The groups of a phase.

    Attributes:
        kept: Groups that the phase trains on.
        dropped: Groups without spread that dynamic sampling dropped; empty without dynamic sampling.
        num_refills: Groups sampled to replace others.
        seconds: Duration of sampling and scoring.
        choice_metrics: Figures of the choice of its items, the same on all ranks.

    >>> Sampled(kept=[RolloutGroup((), has_spread=True)], dropped=[], num_refills=0).groups
    [RolloutGroup(rollouts=(), has_spread=True)]
    """

    kept: list[RolloutGroup]
    dropped: list[RolloutGroup]
    num_refills: int
    seconds: float = 0.0
    choice_metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def groups(self) -> list[RolloutGroup]:
        """All groups, the kept ones first."""
        return [*self.kept, *self.dropped]

    @property
    def rollouts(self) -> list[Rollout]:
        """The rollouts of all groups."""
        return [rollout for group in self.groups for rollout in group.rollouts]


async def sample_groups(
    collector: Collector, draw: Draw, spare: Sequence[int], max_refills: int, by_turn: bool = False
) -> Sampled:
    """Samples a draw and replaces groups without spread, at most `max_refills` times. Source: DAPO, arXiv:2503.14476, 3.2.

    Args:
        collector: Samples and scores.
        draw: The phase's items.
        spare: Items that may replace others, each once, in order.
        max_refills: Largest number of repeats; 0 keeps groups without spread.
        by_turn: Whether siblings with equal rewards have spread if they got them in other turns.
    """
    with counted(draw) as counting:
        return await _sample(collector, counting, spare, max_refills, by_turn)


async def _sample(collector: Collector, draw: Draw, spare: Sequence[int], max_refills: int, by_turn: bool) -> Sampled:
    groups = make_groups(await collector.collect(draw), by_turn)
    if max_refills == 0:
        return Sampled(groups, [], 0)
    kept, dropped, num_refills = [], [], 0
    for attempt in range(max_refills + 1):
        kept += [group for group in groups if group.has_spread]
        dropped += [group for group in groups if not group.has_spread]
        indices = list(spare[num_refills : num_refills + len(draw.indices) - len(kept)])
        if attempt == max_refills or not indices:
            break
        num_refills += len(indices)
        if draw.activity is not None:
            draw.activity.expect(draw.num_rollouts(indices))
        groups = make_groups(await collector.collect(replace(draw, indices=indices)), by_turn)
    return Sampled(kept, dropped, num_refills)
