import pytest

from fuchsia_pl.rollouts.addressing import derived_seed, item_indices, refill_indices


def test_every_part_of_an_address_matters_and_nothing_else():
    base = (0, "train", 1, 2, 3)
    others = [
        (1, "train", 1, 2, 3),
        (0, "test", 1, 2, 3),
        (0, "train", 2, 2, 3),
        (0, "train", 1, 3, 3),
        (0, "train", 1, 2, 4),
    ]
    assert derived_seed(*base) == derived_seed(*base)
    assert len({derived_seed(*address) for address in [base, *others]}) == 6
    assert all(0 <= derived_seed(0, step) < 2**63 for step in range(100))


def test_a_pass_draws_every_item_once_and_the_next_pass_in_another_order():
    first = [item for step in range(5) for item in item_indices(0, step, num_items=20, batch_size=4)]
    second = [item for step in range(5, 10) for item in item_indices(0, step, num_items=20, batch_size=4)]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != [item for step in range(5) for item in item_indices(1, step, num_items=20, batch_size=4)]


def test_a_step_never_draws_an_item_twice_where_the_data_is_no_multiple():
    for step in range(40):
        assert len(set(item_indices(0, step, num_items=7, batch_size=3))) == 3


def test_too_few_items_are_refused():
    with pytest.raises(ValueError, match=r"has 3 training items, fewer than data.batch_size=4"):
        item_indices(0, 0, num_items=3, batch_size=4)


def test_refills_are_the_items_that_the_step_did_not_draw_in_an_order_of_their_own():
    drawn = item_indices(0, step=4, num_items=50, batch_size=10)
    spare = refill_indices(0, 4, 50, drawn)
    assert sorted([*spare, *drawn]) == list(range(50))
    assert spare == refill_indices(0, 4, 50, drawn)
    assert spare != refill_indices(0, 5, 50, drawn)
    assert spare != refill_indices(1, 4, 50, drawn)
