"""A curriculum: items are drawn by their measured success, the neither too easy nor too hard ones first.

The success of an item in a phase is the share of its scored rollouts that count as right. Its rate is the running mean
r <- decay r + (1 - decay) success, and the first success is the first rate. Source of the idea: items that a policy always or
never solves have no spread and teach nothing (DAPO, arXiv:2503.14476, section 3.2); here they are avoided before sampling.

The items of phase p depend on the run's seed, on p, and on the rates after phase p - 1 - `num_ahead`, also if later phases have
been measured by then. So the order does not depend on how long sampling takes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.bounded import call_apart
from fuchsia_pl.rollouts.choice import Choice, Chooser, PhaseSizes
from fuchsia_pl.rollouts.config import RECHECK_PHASES, CurriculumConfig
from fuchsia_pl.rollouts.metrics import are_correct
from fuchsia_pl.rollouts.ranks import Ranks
from fuchsia_pl.rollouts.shares import Pool, counts, counts_between, shuffled
from fuchsia_pl.samples import RolloutGroup
from fuchsia_pl.types import ConfigError

RECHECK_SHARE = 4  # one of so many drawn items may be a recheck
# Of the items inside the band, so many times as many as are needed are considered, those that were drawn least recently. With 1,
# the items of a phase would meet again in every pass over the data.
CONSIDERED = 2
NEVER = -1
logger = logging.getLogger(__name__)


@dataclass
class Drawn:
    """The items that a phase draws from a pool.

    Attributes:
        positions: Their positions.
        num_rechecks: How many of them are outside of the band, and drawn to measure them again.
        num_filled: How many are outside of the band, and drawn because too few items are inside.
        num_overdue: Items outside of the band that were to be measured again, and were not drawn.

    >>> Drawn([4, 2], num_rechecks=1, num_filled=0, num_overdue=0).positions
    [4, 2]
    """

    positions: list[int]
    num_rechecks: int
    num_filled: int
    num_overdue: int


class Curriculum(Chooser):
    """Draws items inside a band of success rates, and others rarely. Items without a rate count as inside.

    Args:
        config: The band and the rest of the settings.
        pools: The training items of each part. Each part keeps its share of the drawn items.
        sizes: Settings of the run.
        num_items: Items of the training split.
        environment: It judges rollouts, unless `config.success` does.
    """

    def __init__(
        self,
        config: CurriculumConfig,
        pools: Sequence[Pool],
        sizes: PhaseSizes,
        num_items: int,
        environment: Environment,
    ) -> None:
        super().__init__(pools, sizes)
        self.config = config
        self.environment = environment
        self.recheck_phases = config.recheck_phases or RECHECK_PHASES
        self.rates = torch.full((num_items,), torch.nan, dtype=torch.float64)
        self.last = torch.full((num_items,), NEVER, dtype=torch.int64)  # the newest phase that drew an item
        self._planned: dict[int, Choice] = {}

    def plan(self, phase: int) -> None:
        """Chooses the items of all phases that may start when this one is taken, with the rates known now."""
        self._planned = {number: choice for number, choice in self._planned.items() if number >= phase}
        for number in range(phase, phase + self.sizes.num_ahead + 1):
            if number not in self._planned:
                self._planned[number] = self._chosen(number)

    def choice(self, phase: int) -> Choice:
        """The items of a phase, which was planned."""
        return self._planned[phase]

    def observe(self, phase: int, groups: Sequence[RolloutGroup], ranks: Ranks) -> None:
        """Updates the rates of the items of a phase, on all ranks alike: the counts of all ranks are added up."""
        counted = torch.zeros(3, len(self.rates), dtype=torch.float64)
        for group, num_right in zip(groups, call_apart(self._num_right, groups), strict=True):
            num_scored = sum(rollout.reward is not None for rollout in group.rollouts)
            counted[:, group.rollouts[0].item_index] += torch.tensor([len(group.rollouts), num_scored, num_right])
        self._update(phase, *ranks.add_up(counted))

    def _update(self, phase: int, sampled: Tensor, scored: Tensor, right: Tensor) -> None:
        """Takes the numbers of sampled, scored and right rollouts of a phase, each [N]."""
        self.rates = updated_rates(self.rates, right / scored, self.config.decay)
        self.last = torch.where(sampled > 0, self.last.clamp(min=phase), self.last)

    def state_dict(self) -> dict[str, Any]:
        """The rates, and the choices of phases that are not yet trained."""
        planned = {
            number: {"drawn": choice.drawn, "spare": choice.spare, "metrics": dict(choice.metrics)}
            for number, choice in self._planned.items()
        }
        return {"rates": self.rates, "last": self.last.clone(), "planned": planned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them.

        Raises:
            ConfigError: The training split has another number of items, or the checkpoint's curriculum draws by another measure.
        """
        if not state_dict:
            logger.warning("the checkpoint has no success rates: data.sampling.curriculum begins with unseen items")
            return
        saved = "level" if "ladders" in state_dict else "item"
        if saved != self.config.by:
            raise ConfigError(
                f"the checkpoint has a curriculum by: {saved}, and data.sampling.curriculum.by is {self.config.by}: use the "
                "same, or resume with data.sampling.curriculum: null"
            )
        if len(state_dict["rates"]) != len(self.rates):
            raise ConfigError(
                f"the checkpoint has success rates of {len(state_dict['rates'])} training items, and the environment has "
                f"{len(self.rates)}: use the same items, or resume with data.sampling.curriculum: null"
            )
        self.rates, self.last = state_dict["rates"], state_dict["last"]
        planned = {number: Choice(**parts) for number, parts in state_dict["planned"].items()}
        if all(map(self._fits, planned.values())):
            self._planned = planned
        else:  # the run was resumed with other sizes, or other prompts fit
            logger.warning("the phases that the checkpoint had planned do not fit the settings: they are planned anew")

    def _fits(self, choice: Choice) -> bool:
        """Whether a choice is one of this run's sizes and items."""
        positions = {position for pool in self.pools for position in pool.positions}
        num_spare = len(positions) - self.sizes.batch_size if self.sizes.has_spare else 0
        has_sizes = (len(choice.drawn), len(choice.spare)) == (self.sizes.batch_size, num_spare)
        return has_sizes and positions.issuperset([*choice.drawn, *choice.spare])

    def _num_right(self, groups: Sequence[RolloutGroup]) -> list[int]:
        """Successful rollouts of each group. Calls the environment."""
        found, limit = [], self.config.success
        for group in groups:
            scored = [rollout for rollout in group.rollouts if rollout.reward is not None]
            right = (
                are_correct(scored, self.environment)
                if limit is None
                else [rollout.reward >= limit for rollout in scored if rollout.reward is not None]
            )
            found.append(sum(right))
        return found

    def _chosen(self, phase: int) -> Choice:
        weights, batch_size = [pool.weight for pool in self.pools], self.sizes.batch_size
        before = counts(weights, phase * batch_size)
        numbers = counts_between(weights, phase * batch_size, batch_size)
        found = [self._drawn(*of_pool, phase) for of_pool in zip(self.pools, before, numbers, strict=True)]
        drawn = shuffled([p for one in found for p in one.positions], self.sizes.run_seed, "curriculum", phase)
        metrics = self._figures(found)
        spare = self._spare(phase, drawn) if self.sizes.has_spare else []
        self.last[drawn] = phase
        return Choice(drawn, spare, metrics)

    def _drawn(self, pool: Pool, num_before: int, number: int, phase: int) -> Drawn:
        """The items of a pool that a phase draws.

        Args:
            pool: The pool.
            num_before: Items that earlier phases drew from it.
            number: Items to draw.
            phase: Number of the phase.
        """
        # All ties below are broken by this order.
        positions = torch.tensor(shuffled(pool.positions, self.sizes.run_seed, "curriculum", pool.name, phase))
        waited = phase - self.last[positions]
        outside = self.distances(positions) > 0.0
        due = positions[outside & (waited >= self.recheck_phases)]
        most = (num_before + number) // RECHECK_SHARE - num_before // RECHECK_SHARE
        rechecked = self._longest_ago(due)[:most]
        wanted = number - len(rechecked)
        taken = self._inside(positions[~outside], wanted)
        rest = positions[outside & ~torch.isin(positions, rechecked)]
        filled = self._nearest(rest)[: wanted - len(taken)]
        num_overdue = len(due) - len(rechecked) - int(torch.isin(due, filled).sum())
        found = torch.cat([rechecked, taken, filled]).tolist()
        return Drawn(found, len(rechecked), len(filled), num_overdue)

    def _inside(self, positions: Tensor, number: int) -> Tensor:
        """Items that were never drawn, then some of those that were drawn least recently; at most `number`."""
        is_new = self.last[positions] == NEVER
        new, earlier = positions[is_new][:number], positions[~is_new]
        wanted = number - len(new)
        considered = self._longest_ago(earlier)[: CONSIDERED * wanted]
        return torch.cat([new, earlier[torch.isin(earlier, considered)][:wanted]])

    def _spare(self, phase: int, drawn: Sequence[int]) -> list[int]:
        """All items that the phase does not draw: those inside the band first, then the nearest to it."""
        everything = [position for pool in self.pools for position in pool.positions]
        positions = torch.tensor(shuffled(everything, self.sizes.run_seed, "curriculum refill", phase))
        found: list[int] = self._nearest(positions[~torch.isin(positions, torch.tensor(drawn))]).tolist()
        return found

    def _longest_ago(self, positions: Tensor) -> Tensor:
        return positions[self.last[positions].argsort(stable=True)]

    def _nearest(self, positions: Tensor) -> Tensor:
        return positions[self.distances(positions).argsort(stable=True)]

    def distances(self, positions: Tensor) -> Tensor:
        """Distances of the rates of some items from the band, 0 inside of it and without a rate; float64.

        Items with distance 0 are drawn as usual, the nearest of the others where those are too few.
        """
        low, high = self.config.band
        rates = self.rates[positions]
        return torch.maximum(low - rates, rates - high).clamp(min=0.0).nan_to_num(nan=0.0)

    def _figures(self, drawn: Sequence[Drawn]) -> dict[str, float]:
        """Shares of the items inside, below and above the band, of those without a rate, which count as inside; and counts."""
        rates, (low, high) = self.rates[[p for pool in self.pools for p in pool.positions]], self.config.band
        below, above = (rates < low).double().mean().item(), (rates > high).double().mean().item()
        return {
            "curriculum/inside": 1.0 - below - above,
            "curriculum/below": below,
            "curriculum/above": above,
            "curriculum/unseen": rates.isnan().double().mean().item(),
            "curriculum/rechecks": float(sum(one.num_rechecks for one in drawn)),
            "curriculum/filled": float(sum(one.num_filled for one in drawn)),
            "curriculum/overdue": float(sum(one.num_overdue for one in drawn)),
        }


def updated_rates(rates: Tensor, measured: Tensor, decay: float) -> Tensor:
    """R <- decay r + (1 - decay) m where an item was measured; its first measurement is its first rate.

    Args:
        rates: Rates so far, NaN for items that were not measured, [N].
        measured: Success in the newest phase, NaN for items that were not in it or not scored, [N].
        decay: Weight of the earlier rate.

    >>> nan = torch.nan
    >>> updated_rates(torch.tensor([nan, 0.5, 0.5]), torch.tensor([1.0, nan, 1.0]), decay=0.75)
    tensor([1.0000, 0.5000, 0.6250])
    """
    moved = torch.where(rates.isnan(), measured, decay * rates + (1.0 - decay) * measured)
    return torch.where(measured.isnan(), rates, moved)
