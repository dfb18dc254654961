"""`fuchsia report`."""

import subprocess
import sys

import pytest

from fuchsia_pl.cli.report import report
from fuchsia_pl.cli.run_folder import CONFIG_FOLDER
from tests.run_folders import make_run
from tests.unit.cli.test_help import PROBE


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/0", "a/1"):
        make_run(tmp_path / "runs" / name)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["a/0"], "runs/a/0/report.html"),
        (["a"], "runs/a/1/report.html"),  # the newest
        (["runs/a/0", "a/1"], "runs/a/0/report.html"),
        (["a/0", "--output", "both.html"], "both.html"),
    ],
)
def test_it_prints_the_file_that_it_wrote(root, capsys, words, file):
    assert report(words) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert list(root.rglob("*.html")) == [root / file]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["b"], "'b' is no run"),
        ([], "the following arguments are required: RUN"),
        (["a/0", "--output", "runs"], "--output runs is a folder: give the name of a file, such as runs/report.html"),
        (["a/0", "--max_rollouts", "-1"], "--max_rollouts must be 0 or more, got -1"),
        (["a/0", "--max_rollouts", "x"], "invalid int value: 'x'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(root, capsys, words, expected):
    with pytest.raises(SystemExit) as caught:
        report(words)
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fuchsia report: error: ")
    assert expected in last


def test_a_file_that_cannot_be_written_is_one_line(root, capsys):
    (root / "file").touch()
    with pytest.raises(SystemExit) as caught:
        report(["a/0", "--output", "file/x.html"])
    assert caught.value.code == 1
    assert "file/x.html cannot be written" in capsys.readouterr().err


def test_the_report_of_a_run_of_a_packaged_config_needs_no_torch(root):
    """Its optimizer, schedule, environment and engine are packaged classes, whose defaults are in a table."""
    (root / "runs/a/0/config.yaml").write_text((CONFIG_FOLDER / "quickstart.yaml").read_text())
    done = subprocess.run([sys.executable, "-c", PROBE, "report", "a/0"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs/a/0/report.html\n", "")
