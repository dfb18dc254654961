import json
import math

from fuchsia_pl.evaluation.figures import Figure
from fuchsia_pl.evaluation.held_out import HELD_OUT_FILE, HeldOut, read_held_out, write_held_out

FIGURES = {"rollout/accuracy": Figure(0.5, 0.4, 0.6), "reward/mean": Figure(1.25, math.nan, math.nan)}


def test_evaluations_are_read_as_they_were_written(tmp_path):
    first, second = (HeldOut(step, "validation", 64, 4, "Arithmetic", FIGURES, num_shared=3) for step in (0, 25))
    write_held_out(tmp_path, [first])
    write_held_out(tmp_path, [second])
    found = read_held_out(tmp_path)
    assert [one.key for one in found] == [(0, "validation", "Arithmetic"), (25, "validation", "Arithmetic")]
    assert found[0].figures["rollout/accuracy"] == FIGURES["rollout/accuracy"]
    assert found[0].num_shared == 3
    assert math.isnan(found[0].figures["reward/mean"].low)
    line = json.loads((tmp_path / HELD_OUT_FILE).read_text().splitlines()[0])
    assert line["figures"]["rollout/accuracy"] == {"value": 0.5, "low": 0.4, "high": 0.6}
    assert line["figures"]["reward/mean"] == {"value": 1.25, "low": None, "high": None}


def test_a_damaged_file_gives_its_whole_lines(tmp_path):
    assert read_held_out(tmp_path) == []
    write_held_out(tmp_path, [HeldOut(0, "test", 1, 1, "A", FIGURES)])
    with (tmp_path / HELD_OUT_FILE).open("a") as stream:
        stream.write('\n[]\n{"step": 1}\n{"figures": {"a": 3}}\n{"step": 5, "fig')
    assert [one.step for one in read_held_out(tmp_path)] == [0]


def test_nothing_is_written_for_no_evaluation(tmp_path):
    write_held_out(tmp_path, [])
    assert not (tmp_path / HELD_OUT_FILE).exists()
