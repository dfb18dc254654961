"""`--ckpt_path` and `--resume`: the checkpoint that a command uses, and the settings that it restores from it."""

import io
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.checkpoints import find_checkpoint
from fuchsia_pl.cli.launch import CHECKPOINT_VARIABLE
from fuchsia_pl.cli.run_folder import new_run_folder
from tests.doubles import TINY
from tests.unit.policy.test_adapter import Touches
from tests.unit.test_cli import config, refused

__all__ = ["config"]  # the fixture

VALIDATE = ("--trainer.limit_val_batches", "1.0")
SCHEDULE = """
model:
  lr_scheduler:
    class_path: torch.optim.lr_scheduler.LinearLR
    init_args: {start_factor: 1.0, end_factor: 0.1, total_iters: 2}
"""


@pytest.fixture(autouse=True)
def no_choice_of_an_earlier_test(monkeypatch):
    monkeypatch.delenv(CHECKPOINT_VARIABLE, raising=False)


@pytest.fixture
def never_started(monkeypatch):
    """Fails the test if the engine is started: refusals must come before."""
    monkeypatch.setattr("tests.doubles.TinyEngine.start", lambda *args: pytest.fail("the engine was started"))


def fit(config: Path, *words: str) -> FuchsiaCLI:
    return FuchsiaCLI(["fit", "--config", str(config), *words])


def last_of(number: int) -> Path:
    return Path(f"runs/tiny/{number}/checkpoints/last.ckpt")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("word", ["last", "best"])
def test_without_a_checkpoint_last_and_best_are_refused(config, capsys, never_started, command, word):
    said = refused(capsys, command, "--config", str(config), "--ckpt_path", word)
    assert f"--ckpt_path {word}: no run under runs/tiny has" in said
    assert not Path("runs").exists()


def test_last_is_the_newest_whole_checkpoint_of_the_configs_runs(config, capsys, tmp_path):
    fit(config)
    fit(config, "--trainer.max_steps", "1")
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text())
    FuchsiaCLI(["fit", "--config", str(other)])
    capsys.readouterr()
    resumed = fit(config, "--ckpt_path", "last", "--trainer.max_epochs", "-1", "--trainer.max_steps", "3")
    assert f"--ckpt_path last: {last_of(1)}, of step 1" in capsys.readouterr().out
    assert resumed.trainer.global_step == 3
    assert len(Path("runs/tiny/2/metrics.csv").read_text().splitlines()) == 1 + 3  # the first is of run 1
    assert yaml.safe_load(Path("runs/tiny/2/config.yaml").read_text())["ckpt_path"] == str(last_of(1))
    # The newest is cut off: the one before it is used, with a message. `validate` uses its weights, not the base model's.
    os.utime(last_of(0), (1, 1))
    whole = last_of(2).read_bytes()
    last_of(2).write_bytes(whole[:-9])
    validated = FuchsiaCLI(["validate", "--config", str(config), "--ckpt_path", "last", *VALIDATE])
    printed = capsys.readouterr().out
    assert f"passed over: the checkpoint {last_of(2)} is cut off" in printed
    assert f"--ckpt_path last: {last_of(1)}, of step 1" in printed
    assert validated.model.loaded_step == 1
    # The clock was set back between the runs, which their numbers reveal.
    assert "clock" not in printed
    last_of(2).write_bytes(whole)
    os.utime(last_of(2), (2, 2))
    console = Console(file=io.StringIO())
    assert find_checkpoint("last", Path("runs/tiny"), console) == last_of(1)
    assert f"If the clock was set back, give its path: --ckpt_path {last_of(2)}\n" in console.file.getvalue()
    assert new_run_folder("runs", "tiny").name == "3"


def test_last_looks_at_trainings_only(config, capsys):
    fit(config)
    evaluation = Path("runs/tiny/eval-1/checkpoints")
    evaluation.mkdir(parents=True)
    shutil.copy(last_of(0), evaluation)
    os.utime(evaluation / "last.ckpt", (2e9, 2e9))
    console = Console(file=io.StringIO())
    assert find_checkpoint("last", Path("runs/tiny"), console) == last_of(0)


def test_best_is_what_a_monitor_kept(config, capsys, tmp_path):
    monitored = tmp_path / "tiny.yaml"
    monitored.write_text(
        (TINY % yaml.safe_load(config.read_text())["model"]["policy"]["name"])
        .replace("max_epochs: 1", "max_epochs: -1")
        .replace(
            "limit_val_batches: 0",
            "limit_val_batches: 1.0, callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint, "
            "init_args: {monitor: validation/reward/mean, mode: max}}]",
        )
        .replace("steps_per_epoch: 2", "steps_per_epoch: 1")
    )
    fit(monitored)
    state = torch.load(last_of(0), weights_only=True)["callbacks"]
    (best,) = [Path(s["best_model_path"]) for s in state.values() if s.get("monitor") == "validation/reward/mean"]
    capsys.readouterr()
    cli = FuchsiaCLI(["validate", "--config", str(monitored), "--ckpt_path", "best"])
    path = Path("runs/tiny/0/checkpoints") / best.name
    assert path.exists()
    assert path.name != "last.ckpt"
    assert f"--ckpt_path best: {path}, of step {cli.model.loaded_step}" in capsys.readouterr().out


def test_words_and_addresses_that_nothing_here_writes_are_refused(config, capsys, never_started):
    for word, said in (
        ("hpc", "word of Lightning's"),
        ("registry:x", "word of Lightning's"),
        ("s3://b/x.ckpt", "address"),
    ):
        assert said in refused(capsys, "fit", "--config", str(config), "--ckpt_path", word)


def test_a_checkpoint_that_cannot_be_used_is_told_in_one_line_and_before_anything_starts(config, capsys, monkeypatch):
    fit(config)
    capsys.readouterr()
    whole = last_of(0).read_bytes()
    monkeypatch.setattr("tests.doubles.TinyEngine.start", lambda *args: pytest.fail("the engine was started"))
    monkeypatch.setattr("fuchsia_pl.policy.policy.load_base", lambda *args: pytest.fail("the model was loaded"))
    Path("empty.ckpt").touch()
    Path("cut.ckpt").write_bytes(whole[: len(whole) // 2])
    Path("folder").mkdir()
    torch.save({"state_dict": Touches(Path("touched"))}, "foreign.ckpt")
    weights_only = torch.load(last_of(0), weights_only=True)
    for key in ("optimizer_states", "optimizer_shapes"):
        weights_only[key] = {}
    del weights_only["optimizer_states"]
    torch.save(weights_only, "weights.ckpt")
    for path, words in (
        ("missing.ckpt", "missing.ckpt does not exist"),
        ("empty.ckpt", "is empty"),
        ("cut.ckpt", "is cut off"),
        ("folder", "is a folder without .metadata"),
        ("foreign.ckpt", "is not a checkpoint of this program"),
        ("weights.ckpt", "holds weights only (save_weights_only)"),
    ):
        said = refused(capsys, "fit", "--config", str(config), "--ckpt_path", path)
        assert words in said
        assert "Traceback" not in said
        assert len(said.splitlines()) == 1
    assert not Path("touched").exists()
    other = refused(
        capsys, "validate", "--config", str(config), "--ckpt_path", str(last_of(0)), "--model.policy.lora.r", "2"
    )
    assert "names or shapes differ: policy.model.base_model.model.model.layers.0" in other
    assert "would let a checkpoint run code" not in other
    unsafe = refused(capsys, "fit", "--config", str(config), "--ckpt_path", str(last_of(0)), "--weights_only", "false")
    assert "would let a checkpoint run code" in unsafe
    assert [folder.name for folder in Path("runs/tiny").iterdir()] == ["0"]


def test_an_adapter_or_a_model_that_cannot_be_used_is_told_before_the_engine_starts(
    config, capsys, monkeypatch, tmp_path
):
    fit(config)
    monkeypatch.setattr("tests.doubles.TinyEngine.start", lambda *args: pytest.fail("the engine was started"))
    adapter = Path("runs/tiny/0/adapter")
    init = ("--model.policy.lora.init_from", str(adapter))
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "is broken or cut off" in refused(capsys, "fit", "--config", str(config), *init)
    file.unlink()
    assert "neither adapter_model.safetensors nor adapter_model.bin" in refused(
        capsys, "fit", "--config", str(config), *init
    )
    model = shutil.copytree(yaml.safe_load(config.read_text())["model"]["policy"]["name"], tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "cannot be read" in refused(capsys, "fit", "--config", str(config), "--model.policy.name", str(model))
    assert [folder.name for folder in Path("runs/tiny").iterdir()] == ["0"]


def test_a_resume_with_another_optimizer_is_refused_until_it_is_decided(config, capsys, monkeypatch):
    fit(config)
    on = ("--ckpt_path", str(last_of(0)), "--trainer.max_epochs", "-1", "--trainer.max_steps", "3")
    slower = ("--model.optimizer.init_args.lr", "0.001")
    with monkeypatch.context() as patch:
        patch.setattr("tests.doubles.TinyEngine.start", lambda *args: pytest.fail("the engine was started"))
        said = refused(capsys, "fit", "--config", str(config), *on, *slower)
        assert "lr is 0.01 in the checkpoint and 0.001 in the config" in said
        assert "resume.optimizer and resume.scheduler decide what" in refused(
            capsys, "fit", "--config", str(config), "--resume.optimizer", "config"
        )
    for choice, rate in (("checkpoint", 0.01), ("config", 0.001)):
        cli = fit(config, *on, *slower, "--resume.optimizer", choice)
        optimizer = cli.trainer.optimizers[0]
        assert optimizer.param_groups[0]["lr"] == rate
        assert {int(state["step"]) for state in optimizer.state.values()} == {3}  # momenta of all three steps
        saved = torch.load(Path(cli.run_folder, "checkpoints/last.ckpt"), weights_only=True)
        assert saved["optimization"]["optimizer"]["settings"]["lr"] == rate
    # The next resume compares with the chosen settings.
    again = ("--ckpt_path", "last", "--trainer.max_epochs", "-1", "--trainer.max_steps", "4")
    assert fit(config, *again, *slower).trainer.optimizers[0].param_groups[0]["lr"] == 0.001


def test_a_schedule_that_has_ended_is_said_and_a_longer_one_can_be_chosen(config, capsys, tmp_path):
    (tmp_path / "schedule.yaml").write_text(SCHEDULE)
    words = ("--config", "schedule.yaml")
    fit(config, *words)
    on = (*words, "--ckpt_path", str(last_of(0)), "--trainer.max_epochs", "-1", "--trainer.max_steps", "4")
    capsys.readouterr()
    ended = fit(config, *on)
    stays = "the schedule LinearLR has ended, and the learning rate stays at 0.001 until step 4; it began at 0.01"
    assert f"resumed after step 2: {stays}" in capsys.readouterr().out
    assert ended.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)
    longer = (*on, "--model.lr_scheduler.init_args.total_iters", "4")
    assert "total_iters is 2 in the checkpoint and 4 in the config" in refused(
        capsys, "fit", "--config", str(config), *longer
    )
    # 0.01 * (1 - 0.9 * 2 / 4) = 0.0055, and of step 4: 0.01 * (1 - 0.9 * 3 / 4) = 0.00325
    chosen = fit(config, *longer, "--resume.scheduler", "config")
    assert (
        "resumed after step 2: the learning rate is 0.0055 now and 0.00325 in step 4 (LinearLR)"
        in capsys.readouterr().out
    )
    assert chosen.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)  # at the end of all four
    kept = fit(config, *longer, "--resume.scheduler", "checkpoint")
    assert kept.trainer.lr_scheduler_configs[0].scheduler.total_iters == 2


def test_a_bad_checkpoint_names_the_newest_good_one_and_last_takes_it(config, capsys, tmp_path):
    """Each fault in turn; the run saved after steps 1 and 2."""
    fit(config, "--checkpoint.every_n_steps", "1")
    capsys.readouterr()
    last, older = last_of(0), last_of(0).with_name("step-1.ckpt")
    whole = last.read_bytes()
    for name, content in (
        ("torn", whole[:-100]),
        ("empty", b""),
        ("foreign", b"hello"),
        ("overwritten", whole[:9000] + bytes(4096) + whole[13096:]),
    ):
        last.write_bytes(content)
        said = refused(capsys, "fit", "--config", str(config), "--ckpt_path", str(last))
        assert f"The newest whole one beside it is {older}, of step 1" in said, name
        assert len(said.splitlines()) == 1, name
    validated = FuchsiaCLI(["validate", "--config", str(config), "--ckpt_path", "last", *VALIDATE])
    assert f"--ckpt_path last: {older}, of step 1" in capsys.readouterr().out
    assert validated.model.loaded_step == 1
    older.write_bytes(b"")
    assert "newest whole one" not in refused(capsys, "fit", "--config", str(config), "--ckpt_path", str(last))
