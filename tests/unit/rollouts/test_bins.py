"""Sizes in few bins of one capacity, by hand and against all partitions."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from fuchsia_pl.rollouts.bins import fill_bins


def test_each_bin_gets_the_largest_size_left_and_the_rest_that_fills_it_best():
    # 60 leaves 40, which 21 + 19 fill, and 50 leaves 50, which 30 + 20 fill. First-fit decreasing puts 30 beside 60 and needs
    # a third bin.
    assert fill_bins([60, 30, 21, 19, 50, 20], 100) == [[0, 2, 3], [4, 1, 5]]
    # Of two rests that fill a bin equally, the one with larger sizes: small ones are easier to place later.
    assert fill_bins([6, 4, 3, 1, 5], 10) == [[0, 1], [4, 2, 3]]


def test_a_size_above_the_capacity_is_alone():
    assert fill_bins([3, 12, 4], 10) == [[1], [2, 0]]
    assert fill_bins([], 10) == []


@given(st.lists(st.integers(1, 40), max_size=200), st.integers(10, 60))
def test_nothing_is_lost_and_no_bin_but_the_last_has_room_for_more(sizes, capacity):
    bins = fill_bins(sizes, capacity)
    assert sorted(position for places in bins for position in places) == list(range(len(sizes)))
    sums = [sum(sizes[position] for position in places) for places in bins]
    for number, (places, total) in enumerate(zip(bins, sums, strict=True)):
        assert total <= capacity or len(places) == 1
        assert all(total + sizes[position] > capacity for later in bins[number + 1 :] for position in later)


def fewest(sizes: list[int], capacity: int) -> int:
    """Smallest number of bins, by trying every place of every size."""

    def place(position: int, rooms: tuple[int, ...]) -> int:
        if position == len(sizes):
            return len(rooms)
        size = sizes[position]
        found = place(position + 1, (*rooms, capacity - size))
        for number, room in enumerate(rooms):
            if size <= room:
                found = min(found, place(position + 1, (*rooms[:number], room - size, *rooms[number + 1 :])))
        return found

    return place(0, ())


def test_there_is_hardly_ever_a_bin_too_many():
    numbers, num_more = random.Random(0), 0
    for _ in range(100):
        sizes = [numbers.randint(1, 20) for _ in range(numbers.randint(1, 7))]
        more = len(fill_bins(sizes, 24)) - fewest(sizes, 24)
        assert 0 <= more <= 1
        num_more += more
    assert num_more <= 5


def test_groups_of_a_step_need_as_few_as_their_tokens_allow():
    for seed in range(20):
        numbers = random.Random(seed)
        groups = [300 + sum(numbers.randint(50, 512) - 1 for _ in range(8)) for _ in range(32)]
        assert len(fill_bins(groups, 16_384)) == math.ceil(sum(groups) / 16_384)
