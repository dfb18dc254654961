import os

import pytest

from fuchsia_pl.cli.find_run import find_run
from fuchsia_pl.types import ConfigError


@pytest.fixture
def root(tmp_path):
    for name in ("a/0", "a/2", "a/10", "a/validate-1", "b/slurm-7.0"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
    (tmp_path / "a/11").mkdir()  # was refused before it began
    return tmp_path


def test_a_run_is_found_by_path_and_by_name(root):
    assert find_run(str(root / "a/2"), "elsewhere") == root / "a/2"
    assert find_run("a/2", root) == root / "a/2"
    assert find_run("b/slurm-7.0", root) == root / "b/slurm-7.0"


def test_a_config_name_is_its_newest_training(root):
    assert find_run("a", root) == root / "a/10"
    assert find_run(str(root / "a"), "elsewhere") == root / "a/10"


def test_without_numbers_the_newest_slurm_job_is_meant_and_never_an_evaluation(root):
    for number, name in enumerate(("b/slurm-9.0", "b/slurm-8.0", "b/eval-slurm-99.0", "b/predict-1")):
        (root / name).mkdir()
        (root / name / "config.yaml").touch()
        os.utime(root / name / "config.yaml", (2e9 + number, 2e9 + number))
    assert find_run("b", root) == root / "b/slurm-8.0"


def test_the_existing_runs_are_listed(root):
    with pytest.raises(ConfigError, match=r"'c' is no run.*: a/0, a/10, a/2, a/validate-1, b/slurm-7\.0\. Give"):
        find_run("c", root)
    with pytest.raises(ConfigError, match="there are none"):
        find_run("c", root / "empty")
