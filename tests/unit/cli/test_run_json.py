"""`run.json` of the runs of the command line, and the names of their folders."""

import os
import signal
import socket
from datetime import datetime
from pathlib import Path

import pytest

import fuchsia_pl
from fuchsia_pl.callbacks import run_state
from fuchsia_pl.callbacks.run_state import RunState
from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.launch import CHECKPOINT_VARIABLE, RUN_FOLDER_VARIABLE
from fuchsia_pl.cli.run_folder import new_run_folder
from fuchsia_pl.files import DiskError
from fuchsia_pl.run_record import read_record
from fuchsia_pl.stopping import Stopped, stopping
from fuchsia_pl.types import ConfigError
from tests.unit.test_cli import config, refused

__all__ = ["config"]  # the fixture

HELD_OUT = ("--trainer.limit_val_batches", "1.0")
RUNS = Path("runs/tiny")


@pytest.fixture(autouse=True)
def outside_of_a_run(monkeypatch):
    for name in (RUN_FOLDER_VARIABLE, CHECKPOINT_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def run(command: str, config: Path, *words: str) -> None:
    FuchsiaCLI([command, "--config", str(config), *words])


def test_a_training_and_what_evaluates_it_have_folders_and_records_of_their_own(config):
    run("fit", config)
    for command in ("validate", "validate", "test"):
        run(command, config, "--ckpt_path", "last", *HELD_OUT)
    run("fit", config, "--ckpt_path", "last", "--trainer.max_steps", "3", "--trainer.max_epochs", "-1")
    assert sorted(folder.name for folder in RUNS.iterdir()) == ["0", "1", "test-1", "validate-1", "validate-2"]
    first, second = read_record(RUNS / "0"), read_record(RUNS / "1")
    assert (first.command, first.outcome, first.reason, first.step, first.max_steps) == ("fit", "finished", "", 2, 2)
    assert (first.version, first.host, first.pid) == (fuchsia_pl.__version__, socket.gethostname(), os.getpid())
    assert first.resumed_from is None
    assert datetime.fromisoformat(first.started_at) <= datetime.fromisoformat(first.ended_at)
    assert (second.step, second.max_steps, second.resumed_from) == (3, 3, str(RUNS / "0/checkpoints/last.ckpt"))
    test = read_record(RUNS / "test-1")
    assert (test.command, test.outcome, test.step, test.max_steps) == ("test", "finished", 2, None)


def test_the_record_of_a_run_that_goes_on_has_its_step(config, monkeypatch):
    monkeypatch.setattr(run_state, "INTERVAL_S", 0.0)
    seen = []

    class Looking(RunState):
        def on_train_batch_end(self, *hook):
            super().on_train_batch_end(*hook)
            seen.append(read_record(RUNS / "0"))

    monkeypatch.setattr("fuchsia_pl.cli.app.RunState", Looking)
    run("fit", config, "--checkpoint.every_n_steps", "100")
    assert [(record.current_outcome, record.step, record.ended_at) for record in seen] == [
        ("running", 1, None),
        ("running", 2, None),
    ]


def test_an_error_is_recorded_with_its_line(config, monkeypatch):
    def fail(*_):
        raise RuntimeError("no\n  tokens\x1b[2J")

    monkeypatch.setattr("fuchsia_pl.module.GRPOModule.training_step", fail)
    with pytest.raises(RuntimeError):
        run("fit", config)
    record = read_record(RUNS / "0")
    assert (record.outcome, record.reason, record.step) == ("failed", "RuntimeError: no tokens\x1b[2J", 0)
    assert "\x1b" not in (RUNS / "0/run.json").read_text()


def test_a_refusal_after_the_run_began_is_recorded_and_one_before_leaves_no_folder(config, capsys, monkeypatch):
    assert "group_size" in refused(capsys, "fit", "--config", str(config), "--data.sampling.group_size", "1")
    assert not RUNS.exists()

    def start(engine, spec):
        spec.log_file.write_text("starting")
        raise ConfigError("no such device")

    monkeypatch.setattr("tests.doubles.TinyEngine.start", start)
    assert "no such device" in refused(capsys, "fit", "--config", str(config))
    record = read_record(RUNS / "0")
    assert (record.outcome, record.reason) == ("failed", "ConfigError: no such device")


def test_a_signal_is_an_end_of_its_own(tmp_path, monkeypatch):
    state = RunState(tmp_path, "fit", 4, None, is_writing=True)
    assert read_record(tmp_path).outcome == "running"
    monkeypatch.setattr(stopping, "signum", signal.SIGTERM)
    with pytest.raises(Stopped), state.recorded():
        raise Stopped(signal.SIGTERM)
    state.end("finished")  # the first end counts
    record = read_record(tmp_path)
    assert (record.outcome, record.reason, record.max_steps) == ("stopped", "SIGTERM", 4)


def test_only_the_first_rank_writes(tmp_path):
    RunState(tmp_path, "fit", 4, None, is_writing=False).end("finished")
    assert not list(tmp_path.iterdir())


def test_a_removed_folder_stays_removed(tmp_path):
    state = RunState(tmp_path, "fit", 4, None, is_writing=True)
    (tmp_path / "run.json").unlink()
    tmp_path.rmdir()
    state.end("failed", "refused")
    assert not tmp_path.exists()


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise DiskError("run.json cannot be written: No space left on device")

    monkeypatch.setattr(run_state, "write_record", full)
    RunState(tmp_path, "fit", 4, None, is_writing=True).end("finished")
    assert "No space left on device" in caplog.text


def test_each_kind_has_its_own_numbers(tmp_path, monkeypatch):
    kinds = ["eval", "fit", "eval", "validate", "predict", "fit", "test"]
    names = [new_run_folder(tmp_path, "x", kind).name for kind in kinds]
    assert names == ["eval-1", "0", "eval-2", "validate-1", "predict-1", "1", "test-1"]
    for name, value in {"NTASKS": "1", "JOB_NAME": "e", "JOB_ID": "71", "STEP_ID": "0", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    folder = new_run_folder(tmp_path, "x", "eval")
    assert folder.name == "eval-slurm-71.0"
    (folder / "config.yaml").touch()
    assert new_run_folder(tmp_path, "x", "eval").name == "eval-slurm-71.0-1"
    assert new_run_folder(tmp_path, "x").name == "slurm-71.0"
