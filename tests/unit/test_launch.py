from pathlib import Path

import pytest

from fuchsia_pl.cli.launch import RUN_FOLDER_VARIABLE, is_first_rank
from fuchsia_pl.cli.run_folder import nearest_existing, new_run_folder, remove_unused, run_name
from fuchsia_pl.types import ConfigError
from tests.forked import free_port

SAY = "from fuchsia_pl.cli.run_folder import new_run_folder; import sys; sys.stdout.write(str(new_run_folder('runs', 'x')))"


@pytest.fixture(autouse=True)
def outside_of_a_run(monkeypatch):
    monkeypatch.delenv(RUN_FOLDER_VARIABLE, raising=False)


def test_all_ranks_of_torchrun_have_the_folder_of_the_first(forkserver, tmp_path):
    """Two processes that share only torchrun's variables; the second starts later."""
    (tmp_path / "runs/x/4").mkdir(parents=True)
    # The first rank has the store, so it runs until the other has read it.
    wait = "while os.environ['RANK'] == '0' and not os.path.exists('read'): time.sleep(0.02)"
    code = f"import os, time; {SAY}; sys.stdout.flush()\n{wait}"
    variables = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    variables["MASTER_PORT"] = str(free_port())
    first, second = (forkserver.start("-c", code, cwd=tmp_path, RANK=rank, **variables) for rank in "01")
    assert second.wait(100) == 0
    (tmp_path / "read").touch()
    assert first.wait(100) == 0
    assert first.printed == second.printed == "runs/x/5"
    (tmp_path / "read").unlink()
    assert sorted(folder.name for folder in (tmp_path / "runs/x").iterdir()) == ["4", "5"]


def test_the_ranks_of_a_slurm_job_share_a_folder_of_its_name(tmp_path, monkeypatch):
    for name, value in {
        "NTASKS": "2",
        "NTASKS_PER_NODE": "2",
        "JOB_NAME": "train",
        "JOB_ID": "71",
        "STEP_ID": "3",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    folders = []
    for rank in (1, 0):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        assert is_first_rank() == (rank == 0)
        folders.append(new_run_folder(tmp_path, "x"))
    assert folders == [tmp_path / "x/slurm-71.3"] * 2
    assert folders[0].is_dir()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # a job that runs again begins a new folder
    assert new_run_folder(tmp_path, "x").name == "slurm-71.3.1"
    (tmp_path / "x/slurm-71.3.1/config.yaml").write_text("")  # and so may a script that srun started
    (tmp_path / "x/slurm-71.3.1/metrics.csv").write_text("")
    again = new_run_folder(tmp_path, "x")
    assert again.name == "slurm-71.3.1-1"
    assert run_name(["fit", f"--config={again}/config.yaml"]) == "x"
    monkeypatch.delenv("SLURM_STEP_ID")  # a batch script without srun may call the command twice
    assert [new_run_folder(tmp_path, "x").name for _ in range(2)] == ["0", "1"]


def test_ranks_with_the_same_process_id_probe_a_shared_folder_with_files_of_their_own(tmp_path, monkeypatch):
    write, probes = Path.write_bytes, []

    def lost(path, content):
        write(path, content)
        probes.append(path.name)
        path.unlink()  # any rank: the probe has been written

    monkeypatch.setattr(Path, "write_bytes", lost)
    assert [new_run_folder(tmp_path, "x").name for _ in range(2)] == ["0", "1"]
    assert len(set(probes)) == 2


def test_a_rank_that_lightning_started_has_the_folder_of_the_rank_that_started_it(tmp_path, monkeypatch):
    folder = new_run_folder(tmp_path, "x")
    assert is_first_rank()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not is_first_rank()
    assert new_run_folder(tmp_path, "x") == folder


def test_what_ran_is_not_removed_for_a_config_that_is_refused(tmp_path):
    settings = ["run.log", "config.yaml", "objective.yaml"]  # written before an engine starts
    for name, files in {"refused": ["run.log"], "late": settings, "ran": [*settings, "engine.log"]}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in files:
            (tmp_path / "runs" / name / file).write_text("")
        remove_unused(tmp_path / "runs" / name, kept=tmp_path)
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["ran"]


def test_empty_folders_of_a_refused_run_go_and_those_that_were_there_stay(tmp_path):
    there, root = tmp_path / "there", tmp_path / "there" / "new" / "runs"
    there.mkdir()
    kept = nearest_existing(root)
    assert kept == there
    remove_unused(new_run_folder(root, "x"), kept)
    assert list(tmp_path.iterdir()) == [there]
    assert list(there.iterdir()) == []
    assert nearest_existing(Path("no/such")) == Path(".")


def test_a_machine_that_nobody_tells_the_run_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(ConfigError, match=r"not the first of several machines.*torchrun"):
        new_run_folder(tmp_path, "x")
    monkeypatch.setenv("NODE_RANK", "0")
    assert new_run_folder(tmp_path, "x").name == "0"
