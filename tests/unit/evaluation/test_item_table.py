import math
from pathlib import Path

import pytest
import torch

from fuchsia_pl.evaluation.intervals import mean_interval
from fuchsia_pl.evaluation.item_table import ItemSums, ItemTable

ROOT = Path(__file__).parents[3]


def test_items_are_in_order_whatever_the_order_of_updates():
    rows = {7: (0.1, 1.0), 2: (0.7, 1.0), 5: (0.2, 2.0)}
    whole, parts = ItemSums(["a"]), ItemSums(["a"])
    whole.update(list(rows), [{"a": pair} for pair in rows.values()])
    for item in (5, 7, 2):
        parts.update([item], [{"a": rows[item]}])
    assert whole.table().items == parts.table().items == [2, 5, 7]
    assert whole.table().value("a") == parts.table().value("a") == (0.7 + 0.2 + 0.1) / 4


def test_an_item_must_not_come_twice():
    sums = ItemSums(["a"])
    sums.update([3, 3], [{"a": (1.0, 1.0)}] * 2)
    with pytest.raises(RuntimeError, match="twice"):
        sums.table()


def test_linearized_values_have_the_figure_as_their_mean():
    table = ItemTable(("a",), [0, 1, 2], torch.tensor([[3.0], [0.0], [1.0]]), torch.tensor([[4.0], [0.0], [1.0]]))
    assert table.value("a") == 0.8
    # 0.8 + (3 - 0.8 * 4) * 3 / 5; an item without samples has the value of the figure; 0.8 + (1 - 0.8) * 3 / 5
    assert table.values("a").tolist() == pytest.approx([0.68, 0.8, 0.92])
    assert math.isnan(table.item_means("a")[1])


@pytest.mark.parametrize(
    ("name", "sums", "is_share"),
    [
        ("pass@4", [0.5, 0.25], True),
        ("rollout/truncated_fraction", [0.0, 0.0], True),
        ("reward/correct", [2.0, 1.0], True),
        ("reward/correct", [2.0, 0.5], False),
        ("reward/penalty", [-1.0, 0.0], False),
        ("reward/large", [2.0, 3.0], False),
        ("rollout/turns", [2.0, 2.0], False),
    ],
)
def test_shares_are_known_by_name_and_rewards_by_value(name, sums, is_share):
    table = ItemTable((name,), [0, 1], torch.tensor(sums)[:, None], torch.full((2, 1), 2.0))
    assert table.is_share(name) is is_share


def test_a_figure_that_covers_no_sample_is_not_a_number():
    table = ItemTable(("a",), [0, 1], torch.zeros(2, 1), torch.zeros(2, 1))
    assert not table.covers("a")
    assert not table.covers("b")
    assert math.isnan(table.value("a"))


TWO_RANKS = """
import sys, torch
from tests.unit.evaluation.test_item_table import numbers_of
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
print(numbers_of(rank, 2))
"""


def numbers_of(rank: int, size: int) -> str:
    """The digits of a figure and its interval, of seven items that some ranks share unequally."""
    rows = torch.rand(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    sums = ItemSums(["a"])
    own = list(range(7))[rank::size]
    sums.update(own, [{"a": tuple(rows[item])} for item in own])
    table = sums.table()
    return f"{table.items} {table.value('a').hex()} {[end.hex() for end in mean_interval(table.values('a'))]}"


def test_two_ranks_have_the_numbers_of_one(forkserver, tmp_path):
    ranks = [forkserver.start("-c", TWO_RANKS, rank, tmp_path / "store") for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    printed = [rank.printed.strip().splitlines()[-1] for rank in ranks]
    assert printed == [numbers_of(0, 1)] * 2
    assert printed[0].startswith("[0, 1, 2, 3, 4, 5, 6] 0x")
