"""A curriculum by level: of each kind of items, the current level is drawn, and its success decides when the level changes.

The success of a level in a phase is the share of right ones among the scored rollouts of its items; its rate is a running mean,
as that of an item is. A rate above the band raises the level by one, a rate below lowers it. Then the rate begins anew. An
environment has levels by `difficulty(item)`, as ReasoningGym has those of reasoning-gym (arXiv:2505.24760).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.bounded import call_apart
from fuchsia_pl.envs.difficulty import Difficulty
from fuchsia_pl.rollouts.choice import Chooser, PhaseSizes, pools_of
from fuchsia_pl.rollouts.config import CurriculumConfig, SamplingConfig
from fuchsia_pl.rollouts.curriculum import Curriculum, Drawn
from fuchsia_pl.rollouts.preparation import as_config_error
from fuchsia_pl.rollouts.shares import Pool, check_pools
from fuchsia_pl.types import ConfigError, Item

MIN_PHASES = 3  # a level changes after as many measured phases: one lucky group must not raise it
NO_RECHECK = 2**62
NO_KIND = ""
logger = logging.getLogger(__name__)


@dataclass
class Ladder:
    """The levels of a kind of items, and where the policy is.

    Attributes:
        levels: All levels that its items have, the lowest first.
        place: Position of the current level in `levels`.
        rate: Running success rate at the current level, NaN before it is measured.
        num_phases: Phases that have measured it.
    """

    levels: list[int]
    place: int = 0
    rate: float = math.nan
    num_phases: int = 0

    @property
    def level(self) -> int:
        """The current level.

        >>> Ladder([0, 2], place=1).level
        2
        """
        return self.levels[self.place]

    def measure(self, success: float, config: CurriculumConfig) -> None:
        """Takes the success of a phase at the current level, in [0, 1], and changes the level if the rate has left the band.

        >>> ladder = Ladder([0, 1])
        >>> for _ in range(3):
        ...     ladder.measure(0.9, CurriculumConfig(by="level"))
        >>> ladder
        Ladder(levels=[0, 1], place=1, rate=nan, num_phases=0)
        """
        self.rate = success if math.isnan(self.rate) else config.decay * self.rate + (1.0 - config.decay) * success
        self.num_phases += 1
        if self.num_phases < MIN_PHASES:
            return
        low, high = config.band
        step = 1 if self.rate > high else -1 if self.rate < low else 0
        place = min(max(self.place + step, 0), len(self.levels) - 1)
        if place != self.place:
            logger.info(
                "the level changes from %d to %d: its success rate is %.2f", self.level, self.levels[place], self.rate
            )
            self.place, self.rate, self.num_phases = place, math.nan, 0


class LevelCurriculum(Curriculum):
    """Draws items of the current level of each kind. Each kind keeps its share of the drawn items.

    Args:
        config: The band and the rest of the settings.
        pools: The training items of each part.
        sizes: Settings of the run.
        difficulties: The kind and level of each training item. Items without one are drawn as usual.
        environment: It judges rollouts, unless `config.success` does.
    """

    def __init__(
        self,
        config: CurriculumConfig,
        pools: Sequence[Pool],
        sizes: PhaseSizes,
        difficulties: Sequence[Difficulty | None],
        environment: Environment,
    ) -> None:
        if len(pools) > 1:
            check_pools(pools, sizes.batch_size)  # a part without items has no kind
        of_items = [found or Difficulty(NO_KIND, 0) for found in difficulties]
        super().__init__(config, by_kind(pools, of_items), sizes, len(of_items), environment)
        self.recheck_phases = NO_RECHECK  # items of other levels do not come back by themselves
        found: dict[str, set[int]] = {}
        for position in (position for pool in pools for position in pool.positions):
            found.setdefault(of_items[position].kind, set()).add(of_items[position].level)
        self.ladders = {kind: Ladder(sorted(levels)) for kind, levels in sorted(found.items())}
        numbers = {kind: number for number, kind in enumerate(self.ladders)}
        # Items whose prompts are too long may have a kind that no pool has. They are never drawn.
        self._kinds = torch.tensor([numbers.get(one.kind, -1) for one in of_items])
        self._levels = torch.tensor([one.level for one in of_items])

    def distances(self, positions: Tensor) -> Tensor:
        """Levels between those of some items and the current ones of their kinds; float64."""
        current = torch.tensor([ladder.level for ladder in self.ladders.values()])
        return (self._levels[positions] - current[self._kinds[positions]]).abs().double()

    def state_dict(self) -> dict[str, Any]:
        """The levels and their rates, beside what a curriculum by item has."""
        return {**super().state_dict(), "ladders": {kind: vars(ladder).copy() for kind, ladder in self.ladders.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them.

        Raises:
            ConfigError: The items have other kinds or levels.
        """
        super().load_state_dict(state_dict)
        if not state_dict:
            return
        saved = {kind: Ladder(**parts) for kind, parts in state_dict["ladders"].items()}
        levels, own = ({kind: one.levels for kind, one in some.items()} for some in (saved, self.ladders))
        if levels != own:
            raise ConfigError(
                f"the checkpoint has a curriculum with the levels {levels}, and the training items have {own}: use the same "
                "items, or resume with data.sampling.curriculum: null"
            )
        self.ladders = saved

    def _update(self, phase: int, sampled: Tensor, scored: Tensor, right: Tensor) -> None:
        super()._update(phase, sampled, scored, right)
        measured = scored.nonzero().flatten()
        at_level = measured[self.distances(measured) == 0.0]  # phases ahead may be of an earlier level
        for number, ladder in enumerate(self.ladders.values()):
            own = at_level[self._kinds[at_level] == number]
            if len(own):
                ladder.measure((right[own].sum() / scored[own].sum()).item(), self.config)

    def _figures(self, drawn: Sequence[Drawn]) -> dict[str, float]:
        levels = {kind: ladder.level for kind, ladder in self.ladders.items() if kind != NO_KIND}
        return {
            **{f"curriculum/level_{kind}": float(level) for kind, level in levels.items()},
            "curriculum/filled": float(sum(one.num_filled for one in drawn)),
        }


def by_kind(pools: Sequence[Pool], difficulties: Sequence[Difficulty]) -> list[Pool]:
    """Splits pools by the kinds of their items, so that a kind keeps its share whichever of its levels is drawn.

    >>> sums = [Difficulty("sums", 0), Difficulty("words", 0), Difficulty("sums", 1)]
    >>> [(pool.name, round(pool.weight, 2), pool.positions) for pool in by_kind([Pool("", 1.0, [0, 1, 2])], sums)]
    [('sums', 0.67, [0, 2]), ('words', 0.33, [1])]
    """
    found = []
    for pool in pools:
        kinds = sorted({difficulties[position].kind for position in pool.positions})
        for kind in kinds:
            own = [position for position in pool.positions if difficulties[position].kind == kind]
            found.append(Pool(kind or pool.name, pool.weight * len(own) / len(pool.positions), own))
    return found


def chooser_for(
    environment: Environment, items: Sequence[Item], fitting: Sequence[int], sampling: SamplingConfig, sizes: PhaseSizes
) -> Chooser:
    """Chooses the items of a run's phases.

    Args:
        environment: The environment.
        items: Its training items.
        fitting: Positions of those whose prompts are short enough.
        sampling: Settings of sampling, with or without a curriculum.
        sizes: Settings of the run.

    Raises:
        ConfigError: A part of a mixture has fewer items than a phase may draw of it, or the curriculum is by level and no kind of
            items has several levels.
    """
    pools, config = pools_of(environment, items, fitting), sampling.curriculum
    if config is None:
        return Chooser(pools, sizes)
    if config.by == "item":
        return Curriculum(config, pools, sizes, len(items), environment)
    with as_config_error(f"{type(environment).__name__}.difficulty"):
        difficulties = call_apart(lambda: [environment.difficulty(item) for item in items])
    _check_difficulties(environment, items, difficulties)
    fits = {(found.kind, found.level) for found in map(difficulties.__getitem__, fitting) if found is not None}
    if len(fits) == len({kind for kind, _ in fits}):
        raise ConfigError(
            f"data.sampling.curriculum.by is level, and no kind of items of {type(environment).__name__} has several levels: "
            "override `difficulty(item)`, give tasks of ReasoningGym `levels`, or set by: item"
        )
    return LevelCurriculum(config, pools, sizes, difficulties, environment)


def _check_difficulties(environment: Environment, items: Sequence[Item], found: Sequence[Any]) -> None:
    for item, one in zip(items, found, strict=True):
        level = one.level if isinstance(one, Difficulty) else None
        if one is not None and not (type(level) is int and level >= 0 and isinstance(one.kind, str) and one.kind):
            raise ConfigError(
                f"{type(environment).__name__}.difficulty returned {one!r:.80} for the item {dict(item)!r:.120}: it must return "
                "a Difficulty with a text as kind and a whole number of 0 or more as level, or None"
            )


def check_repeats(config: CurriculumConfig | None, num_repeated_phases: int | None) -> None:
    """Refuses a curriculum in a run that repeats the items of its first phases.

    Raises:
        ConfigError: There are both.
    """
    if config is not None and num_repeated_phases is not None:
        raise ConfigError(
            "data.sampling.curriculum chooses items by their success, and trainer.overfit_batches repeats the first ones: leave "
            "one of them out"
        )
