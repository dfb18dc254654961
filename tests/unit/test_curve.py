"""The picture of the README contains exactly the points of the recorded run."""

import re
import xml.etree.ElementTree as ET

from tests.bench import curve

METRICS = """\
reward/correct,step,train/loss,validation/reward/correct
,0,,0.25
0.0,1,0.1,
0.5,2,0.2,
,2,,0.75
"""


def test_every_row_is_a_point_at_its_place(tmp_path, monkeypatch):
    source, target = tmp_path / "metrics.csv", tmp_path / "curve.svg"
    source.write_text(METRICS)
    monkeypatch.setattr("sys.argv", ["curve", str(source), str(target)])
    curve.main()
    root = ET.fromstring(target.read_text())
    name = "{http://www.w3.org/2000/svg}"
    # The plot is 648 wide from x = 56 and 196 high up from y = 236: step 1 of 2 is at 56 + 324, reward 0.5 at 236 - 98.
    (line,) = root.iter(f"{name}polyline")
    assert line.attrib["points"] == "380.0,236.0 704.0,138.0"
    dots = [(float(d.attrib["cx"]), float(d.attrib["cy"]), d.attrib["fill"]) for d in root.iter(f"{name}circle")]
    assert (56.0, 187.0, curve.RED) in dots
    assert (704.0, 89.0, curve.RED) in dots
    assert len(dots) == 4 + 2  # the points, and one of each colour in the legend
    texts = [text.text for text in root.iter(f"{name}text")]
    assert texts.count("0.250") == texts.count("0.750") == 1


def test_rows_of_runs_without_held_out_items_still_make_a_picture():
    picture = curve.svg([(1, 0.1), (2, 0.2)], [])
    assert len(re.findall("<circle", picture)) == 2 + 2
