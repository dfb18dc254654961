"""Faults of disks, kills and clocks in a whole run. Each fault is real; `tests/README.md` lists their effects."""

import csv
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.last_row import ROW_KEY, LastRow
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.callbacks.run_checkpoint import AtomicCheckpointIO, RunCheckpoint
from fuchsia_pl.callbacks.run_metrics import RunMetrics, rows_before
from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.chatter import LogFile
from fuchsia_pl.cli.launch import CHECKPOINT_VARIABLE
from fuchsia_pl.cli.main import main
from fuchsia_pl.files import DiskError
from tests.doubles import make_data, make_module, make_trainer
from tests.small_disk import FILLER, fill, make_read_only, make_room, mounted
from tests.unit.test_cli import config, refused

__all__ = ["config"]  # the fixture

TIMEOUT_S = 300


@pytest.fixture
def disk(tmp_path):
    with mounted(tmp_path / "disk") as folder:
        yield folder


@pytest.fixture(autouse=True)
def no_choice_of_an_earlier_test(monkeypatch):
    monkeypatch.delenv(CHECKPOINT_VARIABLE, raising=False)


class Fills(Callback):
    """Fills the disk of the run folder in its third step, before the callbacks after it write.

    Args:
        hook: "rollouts" or "checkpoint".
        spare: Bytes that stay free.
    """

    def __init__(self, hook: str = "rollouts", spare: int = 0) -> None:
        self.hook, self.spare = hook, spare

    def on_train_batch_start(self, trainer, *args):
        if self.hook == "rollouts" and trainer.global_step == 2:
            fill(Path(trainer.default_root_dir), self.spare)

    def on_save_checkpoint(self, trainer, *args):
        if self.hook == "checkpoint" and trainer.global_step == 3:
            fill(Path(trainer.default_root_dir), self.spare)


class Dies(Callback):
    """Kills its process in the middle of a step: after the gradients, before the update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, *args):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "fills", "num_rollouts"),
    [
        (r"/rollouts\.jsonl cannot", Fills("rollouts"), 40),
        (r"/adapter cannot", Fills("checkpoint"), 60),
        # The adapter fits beside the older one, which is then removed; the checkpoint is three times as large.
        (r"/checkpoints/last\.ckpt cannot", Fills("checkpoint", spare=60_000), 60),
    ],
    ids=["rollouts", "adapter", "checkpoint"],
)
def test_a_disk_that_fills_up_leaves_the_older_files_whole(tiny_model, disk, words, fills, num_rollouts):
    module = make_module(tiny_model)
    callbacks = [fills, RolloutLog(), AdapterExport(), RunCheckpoint(every_n_steps=1)]
    trainer = make_trainer(disk, *callbacks, enable_checkpointing=True, plugins=[AtomicCheckpointIO()])
    with pytest.raises(DiskError, match=words + r" be written: No space left on device"):
        trainer.fit(module, datamodule=make_data(module))
    assert len(lines_of(disk / "rollouts.jsonl")) == num_rollouts
    saved = torch.load(disk / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    adapter = load_file(disk / "adapter/adapter_model.safetensors")
    trained = [name for name in saved["state_dict"] if "lora_" in name]
    is_of_step_3 = "checkpoints" in words
    same = [
        torch.equal(adapter[re.sub(r"^policy\.model\.|\.default", "", name)], saved["state_dict"][name])
        for name in trained
    ]
    assert len(same) == len(adapter)
    assert all(same) is not is_of_step_3
    assert [file.name for file in disk.rglob(".*")] == [FILLER]


def test_the_command_tells_of_a_full_disk_in_one_line_and_continues_once_there_is_room(
    config, disk, capsys, monkeypatch
):
    root = ["--trainer.default_root_dir", str(disk)]
    every = ["--checkpoint.every_n_steps", "1", "--trainer.max_epochs", "-1", "--trainer.max_steps", "4"]
    fills = ["--trainer.callbacks", "tests.unit.test_faults.Fills"]
    monkeypatch.setattr(sys, "argv", ["fuchsia", "fit", "--config", str(config), *root, *every, *fills])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    line, *how = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(how) <= 2
    assert how[-1].startswith("continue with: ")
    assert "--ckpt_path" in how[-1]
    assert line.startswith(
        f"error: {disk}/tiny/0/rollouts.jsonl cannot be written: No space left on device (0.0 MB are"
    )
    make_room(disk / "tiny/0")
    cli = FuchsiaCLI(["fit", "--config", str(config), *root, *every, "--ckpt_path", "last"])
    assert cli.trainer.global_step == 4
    with (disk / "tiny/1/metrics.csv").open() as stream:
        assert [row["step"] for row in csv.DictReader(stream)] == ["0", "1", "2", "3"]


def test_a_full_disk_leaves_the_metrics_whole_whatever_is_written_next(disk):
    """A row that does not fit, and a header that changes: Lightning's own writer truncates the file for the second."""
    logger = RunMetrics(disk / "tiny/0")
    logger.log_metrics({"a": 0.5}, step=0)
    logger.save()
    file = disk / "tiny/0/metrics.csv"
    fill(disk)
    logger.log_metrics({"a": 0.5, "b": 2.0}, step=1)
    with pytest.raises(DiskError, match=r"metrics\.csv cannot be written: No space left on device"):
        logger.save()
    assert file.read_text() == "a,step\n0.5,0\n"
    make_room(disk)
    logger.save()
    assert file.read_text() == "a,b,step\n0.5,,0\n0.5,2.0,1\n"
    fill(disk)
    step, whole = 2, file.read_text()
    with pytest.raises(DiskError):  # noqa: PT012  until the last page of the file is full
        while step < 2_000:
            logger.log_metrics({"a": 0.5, "b": 1 / 3}, step=step)
            step, whole = step + 1, file.read_text()
            logger.save()
    assert file.read_text() == whole
    assert whole.endswith("\n")
    assert step > 3


def test_a_log_of_chatter_that_cannot_be_written_is_one_warning(disk, capsys):
    fill(disk)
    handler = LogFile(disk / "run.log")
    logger = logging.Logger("chatter")
    logger.addHandler(handler)
    for _ in range(100):
        logger.warning("x" * 200)
    err = capsys.readouterr().err
    assert err == f"warning: {disk}/run.log cannot be written (No space left on device): the run continues without\n"
    make_room(disk)
    handler.close()


@pytest.mark.parametrize("fault", ["a file", "read-only", "full", "another user's"])
def test_a_root_that_cannot_be_written_is_one_line_before_anything_starts(config, capsys, tmp_path, monkeypatch, fault):
    for place in ("fuchsia_pl.module.resolve_model", "tests.doubles.TinyEngine.start"):
        monkeypatch.setattr(place, lambda *args: pytest.fail("something was started"))
    root, reason = tmp_path / "root", ""
    words = ["fit", "--config", str(config), "--trainer.default_root_dir", str(root)]
    if fault == "a file":
        root.write_text("")
        said, reason = refused(capsys, *words), "Not a directory"
    elif fault == "another user's":
        if os.geteuid() != 0:
            pytest.skip("only root can become another user")
        root.mkdir(mode=0o755)
        # pytest's own folders are root's alone, how many there are depends on how it was started
        closed = [folder for folder in [tmp_path, *tmp_path.parents] if not folder.stat().st_mode & 0o001]
        for folder in closed:
            folder.chmod(folder.stat().st_mode | 0o055)
        os.seteuid(65534)
        try:
            said, reason = refused(capsys, *words), "Permission denied"
        finally:
            os.seteuid(0)
            for folder in closed:
                folder.chmod(folder.stat().st_mode & ~0o055)
    else:
        with mounted(root):
            if fault == "full":
                fill(root, spare=100_000)
            else:
                make_read_only(root)
            said = refused(capsys, *words)
            assert [file.name for file in root.rglob("*")] in ([], [FILLER], [FILLER, "tiny"], ["tiny", FILLER])
        reason = "No space left on device" if fault == "full" else "Read-only file system"
    assert said.count("error: ") == 1
    assert f"trainer.default_root_dir={str(root)!r}" in said
    assert f"({reason}). Give a folder that can be written and has room" in said


def fit_alone(words: list[str]) -> None:
    torch.set_num_threads(1)  # those of the parent process do not exist
    FuchsiaCLI(words)


TIMED = re.compile("perf/|sync/seconds")


def metrics_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as stream:
        return [{k: v for k, v in row.items() if not TIMED.match(k)} for row in csv.DictReader(stream)]


@pytest.mark.parametrize("num_updates", [1, 2])
def test_six_steps_are_three_a_kill_inside_a_step_and_three_more(config, tmp_path, num_updates):
    """Bit for bit: weights, rollouts, and metrics in one file. With two updates, the kill falls between those of a phase."""
    words = ["--config", str(config), "--trainer.max_epochs", "-1", "--trainer.max_steps", "6"]
    words += ["--checkpoint.every_n_steps", "1", "--model.loss.num_policy_updates", str(num_updates)]
    words += ["--data.steps_per_epoch", "4", "--trainer.limit_val_batches", "1.0"]
    dies = ["--trainer.callbacks", "tests.unit.test_faults.Dies", "--trainer.callbacks.init_args.step", "3"]
    killed = multiprocessing.get_context("fork").Process(target=fit_alone, args=(["fit", *words, *dies],))
    killed.start()
    killed.join(TIMEOUT_S)
    assert killed.exitcode == -signal.SIGKILL
    first, second, straight = (Path("runs/tiny") / str(number) for number in range(3))
    with (first / "rollouts.jsonl").open("a") as stream:
        stream.write('{"step": 3, "item_in')  # the state after a kill during a write
    FuchsiaCLI(["fit", *words, "--ckpt_path", "last"])
    FuchsiaCLI(["fit", *words])
    num_kept = 3 if num_updates == 1 else 2
    assert metrics_of(second) == metrics_of(straight)
    assert len([row for row in metrics_of(straight) if row["train/loss"]]) == 6
    weights = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (second, straight)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    before = [line for line in lines_of(first / "rollouts.jsonl") if line["step"] < num_kept]
    assert before + lines_of(second / "rollouts.jsonl") == lines_of(straight / "rollouts.jsonl")


def test_a_kill_between_a_checkpoint_and_the_metrics_of_its_step_loses_none(tiny_model, tmp_path):
    class Keep(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            saved.append(checkpoint)

        def on_train_batch_start(self, trainer, *args):  # like a run that is stopped between two steps
            trainer.save_checkpoint(tmp_path / "between.ckpt")

    saved, folder = [], tmp_path / "tiny/0"
    module = make_module(tiny_model)
    callbacks = [LastRow(), Keep(), RunCheckpoint(every_n_steps=1)]
    trainer = make_trainer(
        folder, *callbacks, logger=RunMetrics(folder), enable_checkpointing=True, log_every_n_steps=1
    )
    trainer.fit(module, datamodule=make_data(module))
    whole = rows_before(folder, {"global_step": 3})
    assert [row["step"] for row in whole] == ["0", "1", "2"]
    in_step = [checkpoint for checkpoint in saved if ROW_KEY in checkpoint]
    assert [checkpoint["global_step"] for checkpoint in in_step] == [1, 2, 3]
    assert len(saved) > 2 * len(in_step)
    for checkpoint in saved:  # nothing twice
        assert rows_before(folder, checkpoint) == whole[: checkpoint["global_step"]]
    file = folder / "metrics.csv"
    torn = file.read_text()[:-9]
    file.write_text(torn, newline="")
    assert rows_before(folder, {"global_step": 3}) == whole[:2]
    assert rows_before(folder, in_step[2]) == whole
    file.unlink()  # a kill after the first checkpoint may leave none
    assert rows_before(folder, in_step[0]) == whole[:1]
    assert isinstance(trainer.logger, CSVLogger)
