"""Some mutated inputs of each kind; `make fuzz` examines five thousand."""

from tests.fuzz import fuzz


def test_mutated_inputs_are_refused_in_one_line_or_read_right(tmp_path):
    counts, faults = fuzz(tmp_path, number=25, seed=0)
    assert not faults, faults[0]
    assert sum(counts.values()) == 5 * 26
    assert all(
        counts[f"{kind}: refused"] >= 10 for kind in ("config", "checkpoint", "adapter", "recorded step", "dataset")
    )


def test_a_null_character_in_a_value_that_may_be_a_path_is_refused(tmp_path):
    """Found by 5,000 configs: the system raises ValueError when such a value is looked up as a file."""
    counts, faults = fuzz(tmp_path, number=1, seed=1084, kinds=("config",))
    assert not faults
    assert counts == {"config: taken": 1, "config: refused": 1}
