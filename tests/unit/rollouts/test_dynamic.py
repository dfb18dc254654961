import asyncio

import pytest

from fuchsia_pl.rollouts.collector import Draw
from fuchsia_pl.rollouts.dynamic import sample_groups
from fuchsia_pl.types import Rollout
from tests.doubles import written


class Scripted:
    """A collector with spread in the groups of given items; it records its draws."""

    def __init__(self, with_spread) -> None:
        self.with_spread = set(with_spread)
        self.asked: list[list[int]] = []

    async def collect(self, draw: Draw) -> list[list[Rollout]]:
        self.asked.append(draw.indices)
        return [[self._rollout(index, 0.0), self._rollout(index, index in self.with_spread)] for index in draw.indices]

    def _rollout(self, index: int, reward: float) -> Rollout:
        return Rollout({}, item_index=index, sibling=0, temperature=1.0, prompt="", reward=float(reward))


def sample(with_spread, spare, max_refills: int):
    collector = Scripted(with_spread)
    draw = Draw(items=[{}] * 20, indices=[0, 1, 2], siblings=2, temperature=1.0, address=(0, "train", 0))
    sampled = asyncio.run(sample_groups(collector, draw, spare, max_refills))
    kept, dropped = ([group.rollouts[0].item_index for group in g] for g in (sampled.kept, sampled.dropped))
    return kept, dropped, sampled.num_refills, collector.asked


def test_without_dynamic_sampling_groups_without_spread_are_kept():
    assert sample({0}, spare=[3, 4], max_refills=0) == ([0, 1, 2], [], 0, [[0, 1, 2]])


def test_groups_without_spread_are_replaced_until_enough_have_one():
    # 1 and 2 lack spread; of 3 and 4 that replace them 3 does too; 5 replaces it
    kept, dropped, refills, asked = sample({0, 4, 5}, spare=[3, 4, 5, 6], max_refills=5)
    assert (kept, dropped, refills) == ([0, 4, 5], [1, 2, 3], 3)
    assert asked == [[0, 1, 2], [3, 4], [5]]


def test_nothing_is_sampled_again_where_all_have_spread():
    assert sample({0, 1, 2}, spare=[3, 4], max_refills=2) == ([0, 1, 2], [], 0, [[0, 1, 2]])


@pytest.mark.parametrize(("max_refills", "asked"), [(1, 2), (2, 3)])
def test_the_refills_are_bounded_even_where_no_group_ever_has_spread(max_refills, asked):
    kept, dropped, refills, calls = sample(set(), spare=list(range(3, 20)), max_refills=max_refills)
    assert (kept, len(calls), refills) == ([], asked, 3 * max_refills)
    assert dropped == list(range(3 + 3 * max_refills))


def test_it_ends_where_no_item_is_left():
    kept, dropped, refills, calls = sample({0}, spare=[3], max_refills=9)
    assert (kept, dropped, refills) == ([0], [1, 2, 3], 1)
    assert len(calls) == 2


class Trading(Scripted):
    """The siblings of all groups have equal rewards; those of given items got them in other turns."""

    def _rollout(self, index: int, reward: float) -> Rollout:
        rollout = Rollout({}, item_index=index, sibling=0, temperature=1.0, prompt="", reward=1.0)
        for _ in range(2):
            rollout.append(written(""))
        rollout.weighted_turn_rewards = [1.0 - reward, reward]
        return rollout


@pytest.mark.parametrize(("by_turn", "kept"), [(True, [0, 3]), (False, [])])
def test_groups_whose_turns_differ_are_replaced_unless_turns_are_compared(by_turn, kept):
    collector = Trading({0, 3})
    draw = Draw(items=[{}] * 20, indices=[0, 1], siblings=2, temperature=1.0, address=(0, "train", 0))
    sampled = asyncio.run(sample_groups(collector, draw, [3, 4], 1, by_turn))
    assert [group.rollouts[0].item_index for group in sampled.kept] == kept
