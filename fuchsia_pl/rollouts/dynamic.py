"""Dynamic sampling: groups without spread are replaced by other items, a bounded number of times."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.credit import make_groups
from fuchsia_pl.types import RolloutGroup


@dataclass(frozen=True)
class Sampled:
    """The groups of a step.

    Attributes:
        kept: What the step goes on with.
        dropped: Groups without spread; empty without dynamic sampling, which keeps them.
        num_refills: Groups sampled to replace others.
    """

    kept: list[RolloutGroup]
    dropped: list[RolloutGroup]
    num_refills: int


async def sample_groups(collector: Collector, draw: Draw, spare: Sequence[int], max_refills: int) -> Sampled:
    """Samples a draw, then up to `max_refills` times as many groups as still lack spread. Source: DAPO, arXiv:2503.14476, 3.2.

    Args:
        collector: Who samples.
        draw: The step's items.
        spare: Items that may replace others, each once, in order.
        max_refills: Bound of the repeats; 0 keeps groups without spread.
    """
    groups = make_groups(await collector.collect(draw))
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
        groups = make_groups(await collector.collect(replace(draw, indices=indices)))
    return Sampled(kept, dropped, num_refills)
