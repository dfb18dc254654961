"""Files of a run."""

import csv
import io
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from rich.console import Console
from transformers import AutoModelForCausalLM

from fuchsia_pl.callbacks import step_timer
from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.baseline_validation import BaselineValidation
from fuchsia_pl.callbacks.console import ConsoleReport
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.callbacks.run_checkpoint import AtomicCheckpointIO, RunCheckpoint, _keep_as
from fuchsia_pl.callbacks.step_timer import StepTimer
from fuchsia_pl.files import DiskError
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.checkpoint_files import read_checkpoint
from fuchsia_pl.rollouts.ranks import Ranks
from fuchsia_pl.types import ConfigError
from tests.doubles import Spread, TinyEnvironment, make_data, make_module, make_trainer
from tests.small_disk import FILLER, fill, mounted

EXPECTED_METRICS = {
    "reward/mean",
    "reward/even",
    "rollout/completion_tokens",
    "rollout/truncated_fraction",
    "rollout/zero_variance_groups",
    "train/loss",
    "train/kl",
    "train/clip_fraction",
    "train/grad_norm",
    "train/logprob_gap",
    "sync/seconds",
    "perf/rollout_tokens_per_s",
    "perf/train_tokens_per_s",
    "perf/step_seconds",
}


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run of 3 steps with 2 micro-batches each and all callbacks of the command."""
    root = tmp_path_factory.mktemp("run")
    module = make_module(tiny_model, LossConfig(beta=0.01))
    callbacks = [
        StepTimer(),
        BaselineValidation(),
        RolloutLog(),
        AdapterExport(),
        RunCheckpoint(every_n_steps=2),
    ]
    trainer = make_trainer(
        root,
        *callbacks,
        accumulate_grad_batches=2,
        num_sanity_val_steps=-1,
        limit_val_batches=1.0,
        log_every_n_steps=1,
        logger=CSVLogger(root, name="", version=""),
        enable_checkpointing=True,
    )
    trainer.fit(module, datamodule=make_data(module))
    return root, module


def metric_rows(root) -> list[dict[str, str]]:
    with (root / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_every_metric_is_logged_once_per_optimizer_step(run):
    rows = [row for row in metric_rows(run[0]) if row["reward/mean"]]
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert set(rows[0]) >= EXPECTED_METRICS
    for row in rows:
        assert all(float(row[name]) >= 0 for name in EXPECTED_METRICS - {"train/loss"})


def test_held_out_figures_are_logged_before_and_after(run):
    rows = [row for row in metric_rows(run[0]) if row["validation/reward/even"]]
    assert [row["step"] for row in rows] == ["0", "2"]  # Lightning counts steps from 0, and 2 is the third
    assert rows[0]["validation/reward/even"] != rows[1]["validation/reward/even"]


def test_every_rollout_is_a_line(run):
    root = run[0]
    lines = [json.loads(line) for line in (root / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 5 * 4
    assert [line["step"] for line in lines] == [0] * 20 + [1] * 20 + [2] * 20
    assert all(line["policy_version"] == line["step"] for line in lines)
    line = lines[0]
    assert line["prompt"] == f"user:{line['item']['n']}?\na:"
    assert len(line["prompt_ids"]) == len(line["prompt"])
    assert 1 <= len(line["completion_ids"]) <= 6
    assert set(line["rewards"]) == {"even", "ended"}
    assert line["reward"] == pytest.approx(line["rewards"]["even"] + 0.5 * line["rewards"]["ended"])
    assert line["status"] in ("completed", "truncated")
    for step in range(3):
        for item in {line["item_index"] for line in lines if line["step"] == step}:
            siblings = [line for line in lines if (line["step"], line["item_index"]) == (step, item)]
            assert sorted(line["sibling"] for line in siblings) == [0, 1, 2, 3]
            assert sum(line["advantage"] for line in siblings) == pytest.approx(0.0, abs=1e-9)


def test_held_out_rollouts_have_a_file_of_their_own(run):
    lines = [json.loads(line) for line in (run[0] / "rollouts-validation.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 4
    assert {line["advantage"] for line in lines} == {None}


def test_everybody_can_read_the_adapter_who_can_read_the_metrics(run):
    root, _ = run
    files = [*(root / "adapter").iterdir(), root / "metrics.csv"]
    assert len({file.stat().st_mode for file in files}) == 1


def test_the_exported_adapter_is_the_trained_one(run, tiny_model):
    root, module = run
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(root / "adapter"))
    expected = dict(module.policy.model.named_parameters())
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, expected[name])
    assert not (root / ".adapter").exists()


def test_the_last_checkpoint_is_of_the_last_step(run):
    folder = run[0] / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "step-2.ckpt"]
    for name, step in (("last.ckpt", 3), ("step-2.ckpt", 2)):
        assert torch.load(folder / name, weights_only=True)["global_step"] == step


@pytest.mark.parametrize(("keep", "older", "links"), [(1, [], True), (2, [4], True), (3, [3, 4], False)])
def test_the_last_checkpoints_stay_whole(tiny_model, tmp_path, monkeypatch, keep, older, links):
    if not links:
        monkeypatch.setattr("os.link", lambda *args: (_ for _ in ()).throw(PermissionError("no links here")))
    module = make_module(tiny_model)
    trainer = make_trainer(
        tmp_path, RunCheckpoint(every_n_steps=1, keep=keep), enable_checkpointing=True, plugins=[AtomicCheckpointIO()]
    )
    trainer.fit(module, datamodule=make_data(module, batch_size=2, steps_per_epoch=5))
    folder = tmp_path / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", *(f"step-{step}.ckpt" for step in older)]
    for step in older:
        assert read_checkpoint(folder / f"step-{step}.ckpt")["global_step"] == step
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 5


class InPlace(TorchCheckpointIO):
    """Writes into the existing file."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
        with Path(path).open("r+b") as stream:
            torch.save(checkpoint, stream)
            stream.truncate()


def test_an_older_checkpoint_stays_whatever_writes_the_next_one(tiny_model, tmp_path):
    module = make_module(tiny_model)
    saver = RunCheckpoint(every_n_steps=1)
    trainer = make_trainer(tmp_path, saver, enable_checkpointing=True, plugins=[InPlace()], max_steps=2)
    trainer.fit(module, datamodule=make_data(module, batch_size=2))
    for name, step in (("last.ckpt", 2), ("step-1.ckpt", 1)):
        assert read_checkpoint(tmp_path / "checkpoints" / name)["global_step"] == step


@pytest.mark.parametrize("is_folder", [False, True], ids=["a file", "a folder"])
def test_a_copy_that_does_not_fit_is_one_line_and_leaves_nothing(tmp_path, is_folder):
    with mounted(tmp_path / "disk") as disk:
        last, older = disk / "last.ckpt", disk / "step-1.ckpt"
        if is_folder:
            last.mkdir()
        (last / "part" if is_folder else last).write_bytes(bytes(1 << 20))
        fill(disk, spare=100_000)
        with pytest.raises(DiskError, match=r"step-1\.ckpt\S* cannot be written: No space left on device"):
            _keep_as(older, last, SingleDeviceStrategy())
        assert {entry.name for entry in disk.iterdir()} == {"last.ckpt", FILLER}


def test_a_later_run_in_the_same_folder_keeps_what_is_whole(tiny_model, tmp_path):
    def fit(max_steps: int, **settings) -> list[str]:
        module = make_module(tiny_model)
        saver = RunCheckpoint(every_n_steps=1, keep=2)
        trainer = make_trainer(tmp_path, saver, enable_checkpointing=True, max_epochs=-1, max_steps=max_steps)
        trainer.fit(module, datamodule=make_data(module, batch_size=2, steps_per_epoch=5), **settings)
        return sorted(file.name for file in (tmp_path / "checkpoints").iterdir())

    last = tmp_path / "checkpoints/last.ckpt"
    assert fit(2) == ["last.ckpt", "step-1.ckpt"]
    assert fit(3, ckpt_path=last) == ["last.ckpt", "step-2.ckpt"]
    last.write_bytes(b"")  # an empty file does not replace a good one
    assert fit(1) == ["last.ckpt", "step-2.ckpt"]
    assert read_checkpoint(last.with_name("step-2.ckpt"))["global_step"] == 2


def test_a_part_of_a_larger_tensor_is_saved_alone(tmp_path):
    """HotSwap keeps weights in host memory as parts of blocks of 1 GiB."""
    block = torch.zeros(1_000_000)
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": block[:10], "b": block[10:20]}}, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").stat().st_size < 10_000


def test_fewer_than_one_checkpoint_is_refused():
    with pytest.raises(ConfigError, match=r"checkpoint.keep must be 1 or more, got 0"):
        RunCheckpoint(keep=0)


def test_tokens_per_second_are_those_of_all_ranks(tiny_model, tmp_path, monkeypatch):
    """Two ranks with the same rows, and a clock that ticks once per look."""
    found = []
    for num_ranks in (1, 2):
        monkeypatch.setattr(step_timer, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
        monkeypatch.setattr(Ranks, "add_up", lambda self, values, n=num_ranks: n * values)
        module, timer = make_module(tiny_model), StepTimer()
        data = make_data(module)
        trainer = make_trainer(tmp_path, timer, sync=AdapterSync(tolerance=100.0), max_steps=1)
        trainer.fit(module, datamodule=data)
        found.append(float(trainer.callback_metrics["perf/train_tokens_per_s"]))
    assert found[1] == 2 * found[0] > 0


def test_a_checkpoint_is_saved_every_n_steps(tiny_model, tmp_path):
    saved = []

    class Record(RunCheckpoint):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            saved.append(checkpoint["global_step"])

        def on_train_end(self, trainer, pl_module):
            pass

    module = make_module(tiny_model)
    trainer = make_trainer(tmp_path, Record(every_n_steps=2), enable_checkpointing=True, accumulate_grad_batches=2)
    trainer.fit(module, datamodule=make_data(module, steps_per_epoch=5))
    assert [step for step in saved if step] == [2, 4]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConsoleReport(every_n_steps=-1), "every_n_steps must be 0 or more, got -1"),
        (lambda: RunCheckpoint(every_n_steps=0), "every_n_steps must be 1 or more, got 0"),
    ],
)
def test_wrong_intervals_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_items_that_json_or_utf8_cannot_hold_end_no_run_and_every_line_stays_json(tiny_model, tmp_path):
    class Odd(TinyEnvironment):
        def train_items(self):
            return [item | ({(0, 1): "a"} if item["n"] % 2 else {"text": "\ud83d"}) for item in super().train_items()]

    module = make_module(tiny_model)
    make_trainer(tmp_path, RolloutLog(), max_steps=1).fit(module, datamodule=make_data(module, environment=Odd()))
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    expected = {n: f"{{'n': {n}, (0, 1): 'a'}}" if n % 2 else {"n": n, "text": "\ud83d"} for n in range(20)}
    assert len(lines) == 20
    assert {line["item_index"] % 2 for line in lines} == {0, 1}
    assert all(line["item"] == expected[line["item_index"]] for line in lines)


class Shown(ConsoleReport):
    """Keeps the rows that a completion is chosen from, after each micro-batch but the last of a step."""

    def __init__(self) -> None:
        super().__init__(every_n_steps=1)
        self.console = Console(file=io.StringIO(), width=200)
        self.rows: list[list[tuple[int, int]]] = []

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.rows.append([(sample.rollout.item_index, sample.rollout.sibling) for sample in self._samples])


def test_facts_of_a_step_are_logged_once_whatever_the_number_of_micro_batches(tiny_model, tmp_path):
    """Of five items, those with an odd number have no spread: their rows are part of no micro-batch."""
    found = []
    for number in (1, 3):
        root, module, report = tmp_path / str(number), make_module(tiny_model), Shown()
        callbacks = RolloutLog(), report
        trainer = make_trainer(root, *callbacks, max_steps=1, accumulate_grad_batches=number, enable_progress_bar=True)
        trainer.fit(module, datamodule=make_data(module, environment=Spread()))
        lines = [json.loads(line) for line in (root / "rollouts.jsonl").read_text().splitlines()]
        found.append(sorted((line["item_index"], line["sibling"], line["advantage"]) for line in lines))
    assert found[0] == found[1]
    assert len(found[0]) == len({row[:2] for row in found[0]}) == 5 * 4
    num_zero = sum(advantage == 0.0 for *_, advantage in found[0])
    assert num_zero > 0
    first, second, after = report.rows
    assert after == []
    assert num_zero < len(first) < len(second) == len(set(second)) < 5 * 4
