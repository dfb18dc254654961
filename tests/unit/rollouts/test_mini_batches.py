"""How a phase's groups and rows are cut into mini-batches."""

import pytest

from fuchsia_pl.rollouts.mini_batches import split_evenly, split_rows
from fuchsia_pl.samples import RolloutGroup, Sample
from fuchsia_pl.types import Rollout


def make_group(item: int, siblings: int = 2) -> RolloutGroup:
    return RolloutGroup(tuple(Rollout({}, item, sibling, 1.0, "") for sibling in range(siblings)), has_spread=True)


def rows_of(*rollouts: Rollout) -> list[Sample]:
    return [Sample(rollout, (1.0,)) for rollout in rollouts]


def places(rollouts) -> list[tuple[int, int]]:
    return [(rollout.item_index, rollout.sibling) for rollout in rollouts]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, ["abcdef"]),
        (2, ["abc", "def"]),
        (3, ["ab", "cd", "ef"]),
        (4, ["a", "bc", "d", "ef"]),
        (7, ["", "a", "b", "c", "d", "e", "f"]),
    ],
)
def test_parts_are_in_order_and_as_long_as_each_other(number, expected):
    assert split_evenly("abcdef", number) == expected


def test_the_parts_of_all_ranks_together_are_the_parts_of_one_rank():
    # Ranks take turns: of the places 0 to 11, three ranks have every third. Two parts of one rank are 0 to 5 and 6 to 11.
    ranks = [list(range(12))[rank::3] for rank in range(3)]
    for part, expected in enumerate([set(range(6)), set(range(6, 12))]):
        assert {place for own in ranks for place in split_evenly(own, 2)[part]} == expected


def test_siblings_stay_together_and_a_rollout_without_a_row_is_unused_in_its_own_part():
    groups = [make_group(item) for item in (7, 3, 5, 1)]
    (a, b), (c, d), (e, f), _ = (group.rollouts for group in groups)
    first, second = split_rows(groups, rows_of(a, b, d, e, f), 2)
    assert places(row.rollout for row in first.samples) == [(7, 0), (7, 1), (3, 1)]
    assert places(first.unused) == [(3, 0)]
    assert first.unused[0] is c
    assert places(row.rollout for row in second.samples) == [(5, 0), (5, 1)]
    assert places(second.unused) == [(1, 0), (1, 1)]


def test_an_item_that_is_there_twice_keeps_its_rows_apart():
    groups = [make_group(7), make_group(7)]
    first, second = split_rows(groups, rows_of(*groups[0].rollouts, groups[1].rollouts[1]), 2)
    assert [row.rollout for row in first.samples] == list(groups[0].rollouts)
    assert second.samples[0].rollout is groups[1].rollouts[1]
    assert second.unused == (groups[1].rollouts[0],)


def test_fewer_groups_than_parts_leave_parts_without_rows():
    group = make_group(4)
    parts = split_rows([group], rows_of(*group.rollouts), 3)
    assert [len(part.samples) for part in parts] == [0, 0, 2]
    assert all(part.unused == () for part in parts)
