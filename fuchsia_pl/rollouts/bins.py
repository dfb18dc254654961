"""Packs sizes into few bins of one capacity. Sizes and capacity are numbers of tokens."""

from bisect import bisect_left
from collections.abc import Sequence

# Sizes that one search combines. More would rarely fill a bin better; without a limit the time would be quadratic.
NUM_COMBINED = 64


def fill_bins(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs sizes into few bins, each as full as possible before the next one is begun.

    A bin gets the largest size that is left, and then those others that fill it best (a subset sum). If sizes are small against
    the capacity, this needs the fewest bins that the total allows; first-fit decreasing often needs one more.

    Args:
        sizes: Each at least 1. One above the capacity gets a bin of its own.
        capacity: Largest sum of a bin.

    Returns:
        Positions of the sizes of each bin. A further size fits into no bin but the last.

    >>> fill_bins([5, 6, 3, 4, 2], capacity=10)
    [[1, 3], [0, 2, 4]]
    """
    left = sorted(range(len(sizes)), key=lambda position: -sizes[position])
    bins = []
    while left:
        taken = [left.pop(0)]
        room = capacity - sizes[taken[0]]
        while (start := bisect_left(left, -room, key=lambda position: -sizes[position])) < len(left):
            chosen = _best_subset([sizes[position] for position in left[start : start + NUM_COMBINED]], room)
            taken += [left[start + place] for place in chosen]
            room -= sum(sizes[left[start + place]] for place in chosen)
            for place in reversed(chosen):
                del left[start + place]
        bins.append(taken)
    return bins


def _best_subset(sizes: Sequence[int], room: int) -> list[int]:
    """Places of the sizes with the largest sum that is at most `room`, among equals those with the first sizes.

    Bit n of a set is 1 if some of the first sizes have the sum n.
    """
    within = (1 << room + 1) - 1
    sums = [1]
    for size in sizes:
        sums.append((sums[-1] | sums[-1] << size) & within)
    best = sums[-1].bit_length() - 1
    chosen = []
    for place in reversed(range(len(sizes))):
        if not sums[place] >> best & 1:  # the sum needs this size
            chosen.append(place)
            best -= sizes[place]
    return chosen[::-1]
