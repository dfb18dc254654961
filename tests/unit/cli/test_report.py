"""`fuchsia report`."""

import pytest

from fuchsia_pl.cli.report import report
from tests.run_folders import make_run


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
