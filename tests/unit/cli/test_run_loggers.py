"""Loggers of a run, read back by their own readers; and runs without their packages."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.run_loggers import placed
from tests.doubles import TINY
from tests.unit.test_cli import config, refused
from tests.wandb_file import read_run

__all__ = ["config"]  # a fixture
HERE = "tests.unit.cli.test_run_loggers"
OFFLINE = "{class_path: WandbLogger, init_args: {project: tests, offline: true}}"
TENSORBOARD = "{class_path: TensorBoardLogger, init_args: {save_dir: .}}"
LOGGED = ("--completions_table.every_n_steps", "1", "--completions_table.max_rows", "4", "--trainer.limit_val_batches")


@pytest.fixture(scope="module")
def run_folder(tiny_model, tmp_path_factory) -> Path:
    """A run of two steps with a validation, logged to Weights & Biases and TensorBoard."""
    root = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["fuchsia"])
        patch.setenv("WANDB_SILENT", "true")
        patch.setattr("fuchsia_pl.cli.app.chatter_to", lambda folder: None)
        (root / "tiny.yaml").write_text(TINY % tiny_model)
        words = [*LOGGED, "1.0", "--run_summary.adapter_artifact", "true", "--model.loss.beta", "0.01"]
        loggers = ["--trainer.logger", OFFLINE, "--trainer.logger+", TENSORBOARD]
        FuchsiaCLI(["fit", "--config", "tiny.yaml", *words, *loggers])
    return root / "runs" / "tiny" / "0"


def metrics_of(folder: Path) -> dict[tuple[str, int], float]:
    """The values of `metrics.csv`, by metric and step."""
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return {
        (name, int(row["step"])): float(value)
        for row in rows
        for name, value in row.items()
        if value and name not in ("step", "epoch")
    }


def same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))


def test_weights_and_biases_hold_every_metric_under_its_step(run_folder):
    run = read_run(run_folder)
    found = {
        (name, row["trainer/global_step"]): value
        for row in run["history"]
        for name, value in row.items()
        if "trainer/global_step" in row
    }
    expected = metrics_of(run_folder)
    assert {name.partition("/")[0] for name, _ in expected} >= {"reward", "rollout", "train", "validation", "perf"}
    assert {key for key in expected if key not in found} == set()
    assert all(same(found[key], value) for key, value in expected.items())
    assert run["axes"]["*"] == "trainer/global_step"
    assert run["exit"] == 0


def test_weights_and_biases_hold_name_hyperparameters_completions_summary_and_adapter(run_folder, tiny_model):
    run = read_run(run_folder)
    assert (run["name"], run["project"]) == ("tiny/0", "tests")
    config = run["config"]
    assert config["model"]["name"] == str(tiny_model)
    assert config["objective"]["beta"] == 0.01
    assert config["optimizer"]["lr"] == 0.01
    assert config["data"]["environment"]["num_items"] == 20
    (wandb_folder,) = run_folder.glob("wandb/offline-run-*")
    tables = [row for row in run["history"] if any(name.startswith("completions/train") for name in row)]
    assert len(tables) == 2
    files = sorted(wandb_folder.glob("files/media/table/completions/*.json"))
    assert len(files) == 3  # two steps and one validation
    table = json.loads(files[0].read_text())
    assert table["columns"][6:8] == ["prompt", "completion"]
    assert len(table["data"]) == 4
    logged = metrics_of(run_folder)
    assert same(run["summary"]["best/validation/reward/mean"], logged[("validation/reward/mean", 1)])
    adapters = {artifact.name for artifact in run["artifacts"] if artifact.type == "model"}
    assert [name.startswith("adapter-") for name in adapters] == [True]


def test_tensorboard_holds_every_metric_hyperparameters_and_completions(run_folder, tiny_model):
    events = EventAccumulator(str(run_folder), {"tensors": 0, "scalars": 0})
    events.Reload()
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    expected = metrics_of(run_folder)
    assert {key for key in expected if key not in found} == set()
    assert all(same(found[key], value) for key, value in expected.items())
    assert "hp_metric" not in events.Tags()["scalars"]

    def texts(tag: str) -> list[tuple[int, str]]:
        return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(f"{tag}/text_summary")]

    assert [step for step, _ in texts("completions/train")] == [0, 1]
    assert texts("completions/train")[0][1].count("**sibling**") == 4
    assert "completions/validation/text_summary" in events.Tags()["tensors"]
    assert yaml.safe_load(texts("hyperparameters")[0][1])["optimizer"]["lr"] == 0.01
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["model/name"].string_value == str(tiny_model)
    assert settings["optimizer/lr"].number_value == 0.01
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    figures = {info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos}
    assert figures >= {"validation/reward/mean", "reward/mean", "reward/even", "train/kl"}
    assert figures <= {name for name, _ in expected}  # each is a curve


def test_files_of_loggers_are_in_the_run_folder_and_the_saved_config_does_not_name_it(run_folder):
    assert sorted(entry.name for entry in run_folder.parents[2].iterdir()) == ["runs", "tiny.yaml"]
    loggers = yaml.safe_load((run_folder / "config.yaml").read_text())["trainer"]["logger"]
    assert [logger["init_args"]["save_dir"] for logger in loggers] == [".", "."]
    assert loggers[0]["init_args"]["name"] is None


def test_own_places_and_names_are_kept(tmp_path, monkeypatch):
    folder = tmp_path / "runs/tiny/3"

    def made(kind, **settings):
        logger = kind(**settings)
        return placed([logger], [Namespace(init_args=Namespace(**settings))], folder)[0]

    own = made(WandbLogger, name="mine", save_dir=str(tmp_path), offline=True)
    assert (own._name, own.save_dir) == ("mine", str(tmp_path))
    assert made(WandbLogger)._name == "tiny/3"
    monkeypatch.setenv("WANDB_NAME", "theirs")
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    theirs = made(WandbLogger)
    assert (theirs._name, theirs.save_dir) == (None, "elsewhere")
    assert made(TensorBoardLogger, save_dir=".").log_dir.rstrip("/") == str(folder)
    assert made(TensorBoardLogger, save_dir=str(tmp_path)).log_dir == str(tmp_path / "lightning_logs/version_0")
    assert made(TensorBoardLogger, save_dir=".", name="tb").log_dir == str(folder / "tb/version_0")
    other = CSVLogger(tmp_path)
    assert placed([other], [Namespace(init_args=Namespace(save_dir="."))], folder) == [other]


def test_a_logger_that_does_not_start_is_one_line_before_the_engine_starts(config, capsys, monkeypatch, tmp_path):
    def fail(**settings):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr("wandb.init", fail)
    monkeypatch.setattr("tests.doubles.TinyEngine.start", lambda *args: pytest.fail("the engine was started"))
    error = refused(capsys, "fit", "--config", str(config), "--trainer.logger", "WandbLogger")
    (line,) = [line for line in error.splitlines() if "error:" in line]
    assert "WandbLogger does not start: No API key configured. Use `wandb login` to log in." in line
    assert "--trainer.logger.init_args.offline true" in line
    assert not (tmp_path / "runs").exists()


class NoExperiment(Logger):
    """A logger of a user that has nothing to start."""

    name, version = "none", 0

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params, *args, **kwargs): ...


class Broken(NoExperiment):
    @property
    def experiment(self):
        return self.no_such_attribute


def test_an_attribute_that_a_logger_lacks_in_its_start_is_no_logger_without_a_start(config, capsys):
    words = ["fit", "--config", str(config), "--trainer.max_steps", "1", "--trainer.logger"]
    assert FuchsiaCLI([*words, f"{HERE}.NoExperiment"]).trainer.global_step == 1
    error = refused(capsys, *words, f"{HERE}.Broken")
    assert "trainer.logger: Broken does not start: 'Broken' object has no attribute 'no_such_attribute'" in error


def test_a_refused_run_leaves_no_files_of_loggers(config, capsys, monkeypatch, tmp_path):
    """The prompts are checked after the loggers have started."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = ["--trainer.logger", OFFLINE, "--trainer.logger+", TENSORBOARD]
    error = refused(capsys, "fit", "--config", str(config), *loggers, "--data.sampling.max_length", "6")
    assert "max_length" in error
    assert not (tmp_path / "runs" / "tiny").exists()


WITHOUT = """
import importlib.machinery, importlib.metadata, sys

BLOCKED = ("wandb", "tensorboard", "tensorboardX")
find_spec = importlib.machinery.PathFinder.find_spec

def visible(name, path=None, target=None):
    return None if name.partition(".")[0] in BLOCKED else find_spec(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(visible)
original = importlib.metadata.distribution

def distribution(name):
    if name in BLOCKED:
        raise importlib.metadata.PackageNotFoundError(name)
    return original(name)

importlib.metadata.distribution = distribution
from fuchsia_pl.cli import main
sys.argv[0] = "fuchsia"
main()
"""


def without_packages(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.run([sys.executable, "-c", WITHOUT, *words], capture_output=True, text=True, env=environment)


def test_a_run_needs_neither_package(config, tmp_path):
    done = without_packages("fit", "--config", str(config), "--trainer.max_steps", "1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/tiny/0/adapter/adapter_config.json").exists()


@pytest.mark.parametrize(
    ("logger", "package"), [("WandbLogger", "wandb"), ("TensorBoardLogger --trainer.logger.save_dir .", "tensorboard")]
)
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(config, tmp_path, logger, package):
    done = without_packages("fit", "--config", str(config), "--trainer.logger", *logger.split())
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert f"pip install {package}" in line
    assert "trainer.logger" in line
    assert not (tmp_path / "runs/tiny").exists()
