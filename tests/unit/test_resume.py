"""What a checkpoint holds, what goes on from it, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.owed_validation import OwedValidation
from fuchsia_pl.callbacks.run_checkpoint import AtomicCheckpointIO, RunCheckpoint
from fuchsia_pl.callbacks.run_metrics import RunMetrics, read_rows
from fuchsia_pl.types import ConfigError
from tests.doubles import make_data, make_module, make_trainer


def save_one_step(tiny_model, root, accumulate_grad_batches=1) -> None:
    """Writes `x.ckpt`, of a run of one step."""
    module = make_module(tiny_model)
    trainer = make_trainer(root, max_steps=1, accumulate_grad_batches=accumulate_grad_batches)
    trainer.fit(module, datamodule=make_data(module))
    trainer.save_checkpoint(root / "x.ckpt")


class RecordRows(AdapterSync):
    """Keeps the ids of every micro-batch that was trained. Its tolerance holds with dropout, which no engine has."""

    def __init__(self):
        super().__init__(tolerance=1e-3)
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.rows.append([sample.rollout.token_ids for sample in batch.samples])


class CopyCheckpoint(RunCheckpoint):
    """Keeps a copy of the checkpoint of step 2, as a run killed later would have left it."""

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == 2 and Path(self.dirpath, "last.ckpt").exists():
            shutil.copy(f"{self.dirpath}/last.ckpt", trainer.default_root_dir)


@pytest.mark.parametrize(
    ("killed", "steps_per_epoch"),
    [(True, 4), (False, 4), (False, 2)],
    ids=["killed in mid-epoch", "ended after two steps", "ended with an epoch"],
)
def test_five_steps_are_two_steps_saved_loaded_and_three_more(tiny_model, tmp_path, killed, steps_per_epoch):
    """Bit for bit, with dropout drawing from torch's generator and validation on the way."""

    def run(name, max_steps, ckpt_path=None):
        torch.manual_seed(0)
        module, sync = make_module(tiny_model, dropout=0.1), RecordRows()
        settings = {"max_epochs": -1, "max_steps": max_steps, "accumulate_grad_batches": 2, "limit_val_batches": 1.0}
        checkpoint = CopyCheckpoint(every_n_steps=2)
        trainer = make_trainer(tmp_path / name, checkpoint, sync=sync, enable_checkpointing=True, **settings)
        trainer.fit(module, datamodule=make_data(module, steps_per_epoch=steps_per_epoch), ckpt_path=ckpt_path)
        return module, sync.rows

    straight, rows = run("straight", 5)
    if not killed:
        run("first", 2)
    saved = tmp_path / "straight/last.ckpt" if killed else tmp_path / "first/checkpoints/last.ckpt"
    resumed, rows_after = run("second", 5, ckpt_path=saved)
    assert len(rows) == 10
    assert rows_after == rows[4:]
    for got, expected in zip(
        resumed.policy.trainable_parameters(), straight.policy.trainable_parameters(), strict=True
    ):
        assert torch.equal(got, expected)


def test_a_checkpoint_holds_the_adapter_and_never_the_base(tiny_model, tmp_path):
    save_one_step(tiny_model, tmp_path)
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in name for name in state)


def test_a_run_does_not_go_on_with_another_number_of_micro_batches(tiny_model, tmp_path):
    save_one_step(tiny_model, tmp_path, accumulate_grad_batches=2)
    module = make_module(tiny_model)
    again = make_trainer(tmp_path, max_epochs=-1, max_steps=2, accumulate_grad_batches=4)
    with pytest.raises(ConfigError, match=r"has 2 micro-batches per step, and this run has 4: set trainer.accumulate"):
        again.fit(module, datamodule=make_data(module), ckpt_path=tmp_path / "x.ckpt")


def test_a_checkpoint_of_another_adapter_is_refused(tiny_model, tmp_path):
    save_one_step(tiny_model, tmp_path)
    module = make_module(tiny_model, r=2)
    with pytest.raises(
        ValueError,
        match=r"names or shapes differ: policy.* has shape \(4, \d+\) instead of \(2, .*config.yaml of the run",
    ):
        make_trainer(tmp_path, max_steps=2).fit(module, datamodule=make_data(module), ckpt_path=tmp_path / "x.ckpt")


class Stop(Callback):
    """Asks for the end after some micro-batches, as a time limit does."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def on_train_batch_end(self, trainer, *args):
        self.num_batches -= 1
        trainer.should_stop = self.num_batches <= 0


class Saved(RunCheckpoint):
    """Keeps the step and the micro-batches of its epoch that each checkpoint was saved after."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.saved: list[tuple[int, int]] = []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.saved.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready))


def run_on(tiny_model, root, *callbacks, ckpt_path=None, **settings):
    """A run of two micro-batches a step, four steps an epoch."""
    module = make_module(tiny_model)
    settings = {"accumulate_grad_batches": 2, "max_epochs": -1, "enable_checkpointing": True, **settings}
    trainer = make_trainer(root, *callbacks, **settings)
    trainer.fit(module, datamodule=make_data(module, steps_per_epoch=4), ckpt_path=ckpt_path)
    return trainer


def test_checkpoints_are_saved_between_steps_only_and_a_resumed_run_is_resumed_from(tiny_model, tmp_path):
    """The first micro-batch after a resume has the step number of the checkpoint, and would be saved again."""
    run_on(tiny_model, tmp_path / "first", RunCheckpoint(every_n_steps=2), max_steps=2)
    resumed = Saved(every_n_steps=2)
    checkpoints = "checkpoints/last.ckpt"
    run_on(tiny_model, tmp_path / "second", resumed, Stop(3), max_steps=9, ckpt_path=tmp_path / "first" / checkpoints)
    assert resumed.saved == []  # 3 micro-batches are a step and a half
    assert not (tmp_path / "second" / checkpoints).exists()
    again = Saved(every_n_steps=2)
    run_on(tiny_model, tmp_path / "third", again, max_steps=5, ckpt_path=tmp_path / "first" / checkpoints)
    assert again.saved == [(4, 8), (5, 2)]
    last = run_on(tiny_model, tmp_path / "fourth", max_steps=6, ckpt_path=tmp_path / "third" / checkpoints)
    assert last.global_step == 6


def test_a_run_that_is_stopped_within_a_step_keeps_the_checkpoint_before_it(tiny_model, tmp_path):
    run_on(tiny_model, tmp_path, RunCheckpoint(every_n_steps=1), Stop(5), max_steps=9)
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert run_on(tiny_model, tmp_path, max_steps=3, ckpt_path=tmp_path / "checkpoints/last.ckpt").global_step == 3


def test_a_checkpoint_from_within_a_step_is_refused(tiny_model, tmp_path):
    trainer = run_on(tiny_model, tmp_path, Stop(3), max_steps=9)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(
        ConfigError, match="saved 1 micro-batches into the step after 1, whose gradients it does not hold"
    ):
        run_on(tiny_model, tmp_path, max_steps=9, ckpt_path=tmp_path / "x.ckpt")


def test_a_kill_while_a_checkpoint_is_written_leaves_the_older_one(tmp_path, monkeypatch):
    """Nothing goes through the folder for temporary files, which may be on another file system."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    path, io = tmp_path / "checkpoints/last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    save = torch.save

    def killed(checkpoint, stream):
        save(checkpoint, stream)
        stream.truncate(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    monkeypatch.setattr(torch, "save", save)
    io.save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_run_that_was_killed_before_its_export_leaves_the_adapter_when_it_is_resumed(tiny_model, tmp_path, strategy):
    """The checkpoint is of the last step, so Lightning trains nothing and calls no `on_train_end`."""
    folders = [tmp_path / name for name in ("first", "resumed")]
    for folder, checkpoint in zip(folders, (None, folders[0] / "last.ckpt"), strict=True):
        module = make_module(tiny_model)
        settings = {"strategy": strategy, "devices": 1} if strategy == "ddp" else {}
        trainer = make_trainer(folder, AdapterExport(), max_steps=2, **settings)
        trainer.fit(module, datamodule=make_data(module), ckpt_path=checkpoint)
        if checkpoint is None:
            trainer.save_checkpoint(folder / "last.ckpt")
    first, resumed = (load_file(folder / "adapter/adapter_model.safetensors") for folder in folders)
    assert first.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in first.items())


class StopsAtStep(Callback):
    """Ends a run in the validation after a step, or at the start of the next epoch, as a kill does."""

    def __init__(self, step):
        self.step = step

    def on_validation_start(self, trainer, pl_module):
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


class CountsValidations(Callback):
    def __init__(self):
        self.found = []

    def on_validation_end(self, trainer, pl_module):
        # Optimizer steps, and the step and the epoch that loggers get.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.found.append((trainer.global_step, step, trainer.current_epoch))


AFTER_2, AFTER_4 = (2, 1, 0), (4, 3, 1)


@pytest.mark.parametrize(
    ("stop_at", "every_n_epochs", "is_logged", "expected"),
    [
        (2, 1, False, [AFTER_2, AFTER_4]),
        (2, 1, True, [AFTER_4]),
        (4, 1, False, [AFTER_4]),
        (4, 1, True, []),
        (2, 2, False, [AFTER_4]),  # none is due after step 2
        (4, 2, False, [AFTER_4]),
    ],
)
def test_a_validation_that_a_kill_cut_off_is_repeated(
    tiny_model, tmp_path, stop_at, every_n_epochs, is_logged, expected
):
    settings = {"max_steps": 4, "max_epochs": -1, "limit_val_batches": 1.0, "enable_checkpointing": True}
    settings["check_val_every_n_epoch"] = every_n_epochs

    def run(folder, *callbacks, ckpt_path=None, **more):
        counts, module = CountsValidations(), make_module(tiny_model)
        trainer = make_trainer(
            folder, RunCheckpoint(every_n_steps=1), OwedValidation(), counts, *callbacks, **settings, **more
        )
        trainer.fit(module, datamodule=make_data(module, steps_per_epoch=2), ckpt_path=ckpt_path)
        return counts.found

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", StopsAtStep(stop_at))
    earlier = [{"step": str(stop_at - 1), "validation/reward/mean": "1.0" if is_logged else ""}]
    logger = RunMetrics(tmp_path / "x/resumed/0", earlier)
    last = tmp_path / "killed/checkpoints/last.ckpt"
    assert run(tmp_path / "resumed", ckpt_path=last, logger=logger) == expected
    assert (tmp_path / "resumed/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize(("is_logged", "expected"), [(False, [1, 2, 3, 4]), (True, [2, 3, 4])])
def test_a_validation_within_an_epoch_that_a_kill_cut_off_is_repeated(tiny_model, tmp_path, is_logged, expected):
    settings = {"max_steps": 4, "max_epochs": -1, "limit_val_batches": 1.0, "enable_checkpointing": True}
    settings |= {"val_check_interval": 1, "accumulate_grad_batches": 2}

    def run(folder, *callbacks, ckpt_path=None, **more):
        counts, module = CountsValidations(), make_module(tiny_model)
        parts = (RunCheckpoint(every_n_steps=1), OwedValidation(), counts, *callbacks)
        trainer = make_trainer(folder, *parts, **settings, **more)
        trainer.fit(module, datamodule=make_data(module, steps_per_epoch=4), ckpt_path=ckpt_path)
        return [steps for steps, _, _ in counts.found]

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", StopsAtStep(1))
    earlier = [{"step": "0", "validation/reward/mean": "1.0" if is_logged else ""}]
    last = tmp_path / "killed/checkpoints/last.ckpt"
    assert run(tmp_path / "resumed", ckpt_path=last, logger=RunMetrics(tmp_path / "x/resumed/0", earlier)) == expected


def test_a_checkpoint_from_the_end_of_a_run_owes_no_validation(tiny_model, tmp_path):
    """A checkpoint from the end of a run was saved after its last validation."""

    def run(name, max_steps=2, ckpt_path=None, **settings):
        counts, module = CountsValidations(), make_module(tiny_model)
        callbacks = (RunCheckpoint(every_n_steps=1), AdapterExport(), OwedValidation(), counts)
        settings |= {"max_steps": max_steps, "limit_val_batches": 1.0, "enable_checkpointing": True}
        trainer = make_trainer(tmp_path / name, *callbacks, **settings)
        trainer.fit(module, datamodule=make_data(module, steps_per_epoch=2), ckpt_path=ckpt_path)
        return counts.found

    assert run("first") == [AFTER_2]
    last = tmp_path / "first/checkpoints/last.ckpt"
    assert run("without", ckpt_path=last) == []
    assert run("with", ckpt_path=last, logger=RunMetrics(tmp_path / "x/with/0", [])) == []
    longer = run(
        "longer", 4, ckpt_path=last, logger=RunMetrics(tmp_path / "x/longer/0", []), max_epochs=-1, log_every_n_steps=1
    )
    assert [steps for steps, _, _ in longer] == [4]
    rows = read_rows(tmp_path / "x/longer/0/metrics.csv")
    assert [row["step"] for row in rows if row["train/loss"]] == ["2", "3"]
    assert [row["step"] for row in rows if row["validation/reward/mean"]] == ["3"]
    assert run("no step", max_steps=0) == []
    assert not (tmp_path / "no step/adapter").exists()
    assert not (tmp_path / "no step/checkpoints").exists()
