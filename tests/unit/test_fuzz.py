"""Some mutated inputs of each kind; `make fuzz` examines five thousand."""

from tests.fuzz import fuzz


def test_mutated_inputs_are_refused_in_one_line_or_read_right(tmp_path):
    counts, faults = fuzz(tmp_path, number=25, seed=0)
    assert not faults, faults[0]
    assert sum(counts.values()) == 5 * 26
    assert all(
        counts[f"{kind}: refused"] >= 10 for kind in ("config", "checkpoint", "adapter", "recorded step", "dataset")
    )
