"""The report of a run that is going on."""

import json
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback

from fuchsia_pl.callbacks import live_report
from fuchsia_pl.callbacks.live_report import LiveReport
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.files import DiskError
from fuchsia_pl.stopping import Stopped
from fuchsia_pl.types import ConfigError
from tests.doubles import make_data, make_module, make_trainer

SUMMARY = re.compile(r'<script[^>]*id="summary"[^>]*>(.*?)</script>', re.DOTALL)


class Seen(Callback):
    """Keeps the status of the report after each step."""

    def __init__(self):
        self.words, self.steps = [], []

    def on_train_batch_end(self, trainer, *args):
        file = f"{trainer.default_root_dir}/report.html"
        try:
            run = summary_of(file)["runs"][0]
        except FileNotFoundError:
            self.words.append(None)
        else:
            self.words.append(run["status"]["words"])
            self.steps.append(run["steps"])


class Fails(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            raise ValueError("no\nmore")


def summary_of(file) -> dict:
    with open(file, encoding="utf-8") as stream:
        return json.loads(SUMMARY.search(stream.read())[1])


def fit(tiny_model, root, *callbacks, max_steps=3):
    module = make_module(tiny_model)
    trainer = make_trainer(root, RolloutLog(), *callbacks, max_steps=max_steps)
    trainer.fit(module, datamodule=make_data(module, batch_size=2, steps_per_epoch=3))


@pytest.fixture
def always(monkeypatch):
    """Writes a report after each step, however long that takes."""
    monkeypatch.setattr(live_report, "MAX_SHARE", 1e9)


def test_the_report_follows_the_run_and_states_its_end(tiny_model, tmp_path, always):
    seen = Seen()
    fit(tiny_model, tmp_path, LiveReport(every_s=1e-9), seen)
    assert [words.partition(",")[0] for words in seen.words] == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
    assert seen.steps == [[1], [1, 2], [1, 2, 3]]  # also without a metrics.csv
    summary = summary_of(tmp_path / "report.html")
    (run,) = summary["runs"]
    assert run["status"]["words"].startswith("finished after 3 steps in ")
    assert len(run["metrics"]["train/loss"]) == 3
    assert summary["num_shown"] == 3 * 2 * 4


def test_a_report_that_is_not_due_is_not_written(tiny_model, tmp_path):
    seen = Seen()
    fit(tiny_model, tmp_path, LiveReport(every_s=1000.0), seen)
    assert len(set(seen.words)) == 1  # the first step only
    assert "finished after 3 steps" in summary_of(tmp_path / "report.html")["runs"][0]["status"]["words"]


def test_a_long_write_makes_the_next_one_rare(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(live_report, "MAX_SHARE", 1e-9)  # any write takes longer than its share
    seen = Seen()
    fit(tiny_model, tmp_path, LiveReport(every_s=1e-9), seen)
    assert len(set(seen.words)) == 1


def test_zero_seconds_is_a_report_at_the_end_only(tiny_model, tmp_path):
    seen = Seen()
    fit(tiny_model, tmp_path, LiveReport(every_s=0), seen)
    assert seen.words == [None] * 3
    assert (tmp_path / "report.html").exists()


def test_it_can_be_turned_off(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, LiveReport(enabled=False), max_steps=1)
    assert not (tmp_path / "report.html").exists()


def test_the_number_of_rollouts_is_bounded(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, LiveReport(max_rollouts=12))
    assert summary_of(tmp_path / "report.html")["num_shown"] == 12


def test_a_run_that_fails_has_a_report_that_states_it(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="no\nmore"):
        fit(tiny_model, tmp_path, Fails(), LiveReport())
    status = summary_of(tmp_path / "report.html")["runs"][0]["status"]
    assert status["words"] == "failed after step 1: ValueError: no more"


class Signals(Callback):
    """A signal arrives in the first step. With `ends`, the run is abandoned, else it completes."""

    def __init__(self, monkeypatch, ends):
        self.monkeypatch, self.ends = monkeypatch, ends

    def on_train_batch_end(self, trainer, *args):
        self.monkeypatch.setattr(live_report, "stopping", SimpleNamespace(signum=15))
        if self.ends:
            raise Stopped(15)


def test_a_run_that_a_signal_stopped_has_a_report_that_states_it(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        fit(tiny_model, tmp_path, Signals(monkeypatch, ends=True), LiveReport())
    assert summary_of(tmp_path / "report.html")["runs"][0]["status"]["words"] == "stopped by SIGTERM after step 1"


def test_a_run_that_completed_after_a_signal_is_finished(tiny_model, tmp_path, monkeypatch):
    fit(tiny_model, tmp_path, Signals(monkeypatch, ends=False), LiveReport(), max_steps=1)
    assert "finished after 1 step" in summary_of(tmp_path / "report.html")["runs"][0]["status"]["words"]


def test_a_full_disk_is_one_warning_and_never_ends_the_run(tiny_model, tmp_path, monkeypatch, caplog, always):
    def full(*_):
        raise DiskError("the disk is full")

    monkeypatch.setattr(live_report, "write_report", full)
    fit(tiny_model, tmp_path, LiveReport(every_s=1e-9))
    assert [r.getMessage() for r in caplog.records if "report" in r.getMessage()] == [
        "the report is not written: DiskError: the disk is full"
    ]


@pytest.mark.parametrize("settings", [{"every_s": -1.0}, {"every_s": float("nan")}, {"max_rollouts": -1}])
def test_numbers_below_zero_are_refused(settings):
    with pytest.raises(ConfigError, match=f"report.{next(iter(settings))} must be 0 or more, got"):
        LiveReport(**settings)
