"""`fuchsia runs` and `fuchsia runs diff` on folders that are written here."""

import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from fuchsia_pl.cli.run_summary import HeldOutFigure, summary
from fuchsia_pl.cli.runs import runs
from tests.unit.cli.test_help import PROBE

STARTED = datetime(2026, 10, 1, 10, tzinfo=UTC).astimezone()  # of quick/0, in the time zone of this machine
GONE = 2**22 + 1  # above the largest process number of Linux


def make(root: Path, name: str, day: int, **record: object) -> Path:
    """A run that began at 10:00 UTC of a day in October and took two hours."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed_everything: {day}\ntrainer: {{max_steps: 4, devices: 1}}\n")
    facts = {
        "command": "fit",
        "started_at": f"2026-10-{day:02d}T10:00:00+00:00",
        "ended_at": f"2026-10-{day:02d}T12:00:00+00:00",
        "version": "0.1.0",
        "host": socket.gethostname(),
        "pid": GONE,
        "outcome": "finished",
        "step": 4,
        "max_steps": 4,
        **record,
    }
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def held_out(folder: Path, *lines: tuple[int, dict[str, tuple[float, float, float]]], environment="A") -> None:
    with (folder / "held_out.jsonl").open("a") as stream:
        for step, figures in lines:
            values = {
                name: dict(zip(("value", "low", "high"), figure, strict=True)) for name, figure in figures.items()
            }
            line = {"step": step, "split": "validation", "num_items": 9, "environment": environment, "figures": values}
            stream.write(json.dumps(line) + "\n")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    root = tmp_path / "runs"
    first = make(root, "quick/0", 1)
    (first / "metrics.csv").write_text("epoch,reward/mean,step\n0,0.25,0\n0,0.75,1\n0,0.5,2\n0,0.9")
    held_out(first, (0, {"rollout/accuracy": (0.125, 0.0, 0.25)}), (4, {"rollout/accuracy": (0.5, 0.4, 0.6)}))
    second = make(root, "quick/1", 3, outcome="failed", reason="EngineError: no\x1b[2J room", step=2)
    (second / "metrics.csv").write_text(
        "epoch,reward/mean,step,validation/reward/mean,validation/rollout/accuracy\n"
        "0,,0,0.1,0.25\n0,0.5,0,,\nbroken\n0,0.75,1,,nan\n0,,2,0.3,0.375\n0,,4,0.2,0.3125\n"
    )
    make(root, "quick/eval-1", 4, command="eval")
    make(root, "math/0", 2, outcome="running", ended_at=None)
    return root


def rows(capsys, *words: str) -> list[dict]:
    assert runs([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_trainings_are_listed_with_the_newest_first(root, capsys):
    listed = rows(capsys)
    assert [row["run"] for row in listed] == ["quick/1", "math/0", "quick/0"]
    assert [row["outcome"] for row in listed] == ["failed", "killed", "finished"]
    failed, killed, finished = listed
    # held_out.jsonl has intervals; else the held-out rows of metrics.csv. An incomplete last line does not count.
    assert finished["best_held_out"] == {"metric": "rollout/accuracy", "value": 0.5, "low": 0.4, "high": 0.6, "step": 4}
    assert failed["best_held_out"] == {
        "metric": "rollout/accuracy",
        "value": 0.375,
        "low": None,
        "high": None,
        "step": 2,
    }
    assert killed["best_held_out"] is None
    assert [row["last_reward"] for row in listed] == [0.75, None, 0.5]
    assert (finished["duration_s"], finished["step"], finished["max_steps"]) == (7200.0, 4, 4)
    assert (finished["config"], finished["kind"], finished["folder"]) == ("quick", "fit", "runs/quick/0")


def test_filters(root, capsys):
    assert [row["run"] for row in rows(capsys, "--all")] == ["quick/eval-1", "quick/1", "math/0", "quick/0"]
    assert [row["run"] for row in rows(capsys, "--name", "quick/*")] == ["quick/1", "quick/0"]
    assert [row["run"] for row in rows(capsys, "--name", "ma*")] == ["math/0"]
    assert [row["run"] for row in rows(capsys, "--ended", "failed")] == ["quick/1"]
    assert [row["run"] for row in rows(capsys, "--limit", "1")] == ["quick/1"]
    assert [row["run"] for row in rows(capsys, "runs/quick")] == ["1", "0"]
    assert [row["config"] for row in rows(capsys, "runs/quick/0")] == ["quick"]


def test_the_table_fits_into_80_columns_and_shows_reasons_without_control_characters(root, capsys):
    assert runs([]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.split("\n\n")[0].splitlines())) <= 80
    assert "\x1b" not in out
    assert "quick/1: EngineError: no\\x1b[2J room" in out
    assert "not shown: 1 of evaluations, tests and predictions (--all)" in out
    (line,) = [line for line in out.splitlines() if line.startswith("quick/0")]
    assert line.split()[:9] == [
        "quick/0",
        "finished",
        "4/4",
        "0.500",
        "0.500",
        *STARTED.strftime("%m-%d %H:%M").split(),
        "2.0",
        "h",
    ]


def test_a_wide_terminal_shows_intervals_and_kinds(root, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    runs([])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("quick/0")]
    assert "0.500 (0.400 to 0.600)" in line
    assert line.split()[1] == "fit"
    assert STARTED.strftime("%Y-%m-%d %H:%M") in line


def test_broken_and_foreign_folders_are_rows(root, capsys):
    (root / "quick/notes\x1b[31m").mkdir()
    torn = make(root, "quick/7", 9)
    (torn / "run.json").write_bytes(b'{"command": "fi\xff')
    (torn / "metrics.csv").write_bytes(b"\x00\xff,step\n")
    (torn / "held_out.jsonl").write_bytes(
        b'\xff\n[]\n{"figures": 3}\n{"figures": {"reward/mean": {"value": "x"}}}\n{"fi'
    )
    os.utime(torn / "config.yaml", (1, 1))  # the oldest file dates a run without a record
    (root / "quick/8").mkdir()
    (root / "quick/8/run.json").symlink_to("run.json")
    listed = {row["run"]: row for row in rows(capsys)}
    assert listed["quick/7"]["outcome"] == "unknown"
    assert listed["quick/7"]["best_held_out"] is None
    assert listed["quick/7"]["started_at"] == "1970-01-01T00:00:01+00:00"
    assert listed["quick/notes\x1b[31m"]["outcome"] == "no run"
    assert listed["quick/8"]["outcome"] == "no run"
    runs([])
    assert "no run: the folder has neither config.yaml nor run.json" in capsys.readouterr().out


def test_sizes_count_each_file_once(root):
    folder = root / "quick/0"
    before = summary(folder, root).size_bytes
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/last.ckpt").write_bytes(bytes(1000))
    os.link(folder / "checkpoints/last.ckpt", folder / "checkpoints/step-1.ckpt")
    (folder / "outside").symlink_to(root)
    link = os.lstat(folder / "outside").st_size
    assert summary(folder, root).size_bytes == before + 1000 + link


def test_the_first_environment_and_the_accuracy_stand_for_a_run(root):
    folder = make(root, "two/0", 5)
    held_out(folder, (0, {"reward/mean": (2.0, 1.0, 3.0), "rollout/accuracy": (0.5, 0.25, 0.75)}))
    held_out(folder, (0, {"rollout/accuracy": (0.875, 0.8, 0.9)}), environment="B")
    assert summary(folder, root).held_out == [HeldOutFigure("rollout/accuracy", 0.5, 0.25, 0.75, 0)]


def test_bad_words_are_one_line(root, capsys):
    assert runs(["elsewhere"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no folder elsewhere: give the root of the runs")
    assert runs(["--limit", "0"]) == 2
    assert "--limit must be 1 or more, got 0" in capsys.readouterr().err
    assert runs(["diff", "quick/0", "quick/9"]) == 2
    assert "'quick/9' is no run" in capsys.readouterr().err
    (root / "quick/1/config.yaml").write_text("a: [")
    assert runs(["diff", "quick/0", "quick/1"]) == 2
    assert "quick/1/config.yaml cannot be read" in capsys.readouterr().err
    (root / "empty").mkdir()
    assert runs(["runs/empty"]) == 0
    assert "there are no runs under runs/empty" in capsys.readouterr().out


def test_diff_shows_what_differs_and_the_figures(root, capsys):
    one = {"trainer": {"max_steps": 4}, "model": {"loss": {"clip": None}, "opt": {"lr": 0.1}}, "data": {"n": [1, 2]}}
    two = {
        "trainer": {"max_steps": 4},
        "model": {"loss": {"clip": None}, "opt": {"lr": 0.2, "eps": 1e-8}},
        "data": {"n": [1, 2]},
    }
    for number, (settings, clip) in enumerate(((one, 0.2), (two, 0.28))):
        (root / f"quick/{number}/config.yaml").write_text(yaml.safe_dump(settings))
        (root / f"quick/{number}/objective.yaml").write_text(yaml.safe_dump({"model": {"loss": {"clip": clip}}}))
    assert runs(["diff", "quick/0", "quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["names"] == ["quick/0", "quick/1"]
    assert found["settings"] == {"model.opt.lr": ["0.1", "0.2"], "model.opt.eps": ["-", "1e-08"]}
    assert found["num_same"] == 3
    assert found["objective"] == {"model.loss.clip": ["0.2", "0.28"]}
    assert found["figures"]["reward, best"] == ["0.750", "0.750"]
    assert found["figures"]["reward, last"] == ["0.500", "0.750"]
    assert found["figures"]["held-out accuracy, best"] == ["0.500 (0.400 to 0.600) at step 4", "0.375 at step 2"]
    assert found["figures"]["held-out accuracy, last"] == ["0.500 (0.400 to 0.600) at step 4", "0.312 at step 4"]
    assert runs(["diff", "quick/0", "quick/1"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "2 settings differ, 3 are the same" in out
    assert "\x1b" not in out


def test_the_list_needs_no_torch(root):
    done = subprocess.run([sys.executable, "-c", PROBE, "runs"], capture_output=True, text=True, cwd=root.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "quick/0" in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "runs", "diff", "quick/0", "quick/1"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
