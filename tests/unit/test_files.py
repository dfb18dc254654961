"""Writes to full disks, and repairs of files after a kill."""

import errno
import fcntl
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from safetensors.torch import save_file

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.cli.checkpoints import earlier_metrics
from fuchsia_pl.cli.run_folder import SAVED_CONFIG
from fuchsia_pl.files import DiskError, append_lines, mend_lines, replacing, roomy_folder, writing
from fuchsia_pl.types import ConfigError
from tests.doubles import make_data, make_module, make_trainer
from tests.small_disk import fill, make_room, mounted


@pytest.fixture
def disk(tmp_path):
    with mounted(tmp_path / "disk") as folder:
        yield folder


def test_lines_that_do_not_fit_are_not_begun(disk):
    file, line = disk / "a.jsonl", "x" * 9_999 + "\n"
    append_lines(file, line)
    fill(disk, spare=4_096)
    with pytest.raises(
        DiskError, match=r"a\.jsonl cannot be written: No space left on device \(0\.\d MB are free there\)"
    ):
        append_lines(file, line)
    assert file.read_text() == line
    make_room(disk)
    append_lines(file, line)
    assert file.read_text() == 2 * line


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(1 << 20)),
        lambda path: torch.save(torch.zeros(1 << 18), path.open("wb")),
        lambda path: torch.save(torch.zeros(1 << 18), path),
        lambda path: save_file({"a": torch.zeros(1 << 18)}, path),
    ],
    ids=["python", "torch to a stream", "torch to a path", "safetensors"],
)
def test_a_file_that_does_not_fit_leaves_the_older_one_and_nothing_else(disk, write):
    """Each library raises a different error for a full disk."""
    path = disk / "folder" / "a"
    with replacing(path) as partial:
        partial.write_text("old")
    fill(disk, spare=100_000)
    reason = "(No space left on device|Input/output error)"  # torch does not report why its own file failed
    words = rf"/folder/a cannot be written: {reason} \(0\.\d MB are free there\).*--ckpt_path last$"
    with pytest.raises(DiskError, match=words), replacing(path) as partial:
        write(partial)
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("a", "old")]


def test_what_is_no_fault_of_the_disk_is_raised_as_it_is(tmp_path):
    for error in (ValueError("lr is -1"), RuntimeError("the rank is lost"), OSError("without a number")):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error


def raise_while_handling(handled, raised, cause):
    try:
        raise handled
    except OSError:
        raise raised from cause


def test_an_error_that_was_handled_before_is_not_taken_for_the_disks(tmp_path):
    """As in `on_exception`: a run that a full disk has ended saves its state."""
    full = OSError(errno.ENOSPC, "no room")

    def write(error):
        with writing(tmp_path):
            raise error

    for raised in (ValueError("lr is -1"), ConfigError("a checkpoint of another model")):
        try:
            raise full
        except OSError:
            with pytest.raises(type(raised)) as caught:
                write(raised)
        assert caught.value is raised
        assert raised.__context__ is full
    with pytest.raises(ValueError, match="told"), writing(tmp_path):
        raise_while_handling(full, ValueError("told"), None)
    with pytest.raises(ConfigError, match="refused"), writing(tmp_path):
        raise_while_handling(full, ConfigError("refused"), full)
    with pytest.raises(DiskError, match="No space left"), writing(tmp_path):
        raise_while_handling(full, ValueError("a library's own"), full)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.text(alphabet="ab\u20ac", max_size=9), max_size=5), st.text(alphabet="ab\u20ac", max_size=9))
def test_a_torn_last_line_goes_and_whole_ones_stay(tmp_path_factory, lines, torn):
    folder = tmp_path_factory.mktemp("torn")
    file, whole = folder / "a.jsonl.rank1", "".join(f"{line}\n" for line in lines)
    file.write_bytes(
        (whole + torn).encode()[: len((whole + torn).encode()) - (1 if torn else 0)]
    )  # within a letter too
    append_lines(file, "c\n")
    assert file.read_text() == whole + "c\n"
    file.write_text(whole + torn)
    mend_lines([file])
    assert file.read_text() == whole
    shutil.rmtree(folder)


def test_a_torn_line_that_is_longer_than_a_block_goes(tmp_path):
    (tmp_path / "a.jsonl").write_text("first\n" + 200_000 * "x")
    mend_lines([tmp_path / "a.jsonl"])
    assert (tmp_path / "a.jsonl").read_text() == "first\n"


def test_a_line_that_another_process_is_writing_is_left_to_it(tmp_path):
    file = tmp_path / "a.jsonl"
    with file.open("a+b", buffering=0) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(b"half")
        mend_lines([file])
        stream.write(b" and half\n")
    mend_lines([file])
    assert file.read_text() == "half and half\n"


def test_a_resume_mends_the_logs_of_its_run_and_no_other_file(tmp_path):
    own = ["rollouts.jsonl", "rollouts.jsonl.rank0", "rollouts-validation.jsonl", "rollouts-predict.jsonl.rank12"]
    foreign = ["train.jsonl", "a.jsonl.gz", "rollouts.jsonl.gz", "rollouts-mine.jsonl", "my-rollouts.jsonl"]
    for name in own + foreign:
        (tmp_path / name).write_text("first\nsecond")
    checkpoint = {"global_step": 3}
    earlier_metrics(tmp_path / "last.ckpt", checkpoint)  # next to other data, not in a run folder
    assert {(tmp_path / name).read_text() for name in own + foreign} == {"first\nsecond"}
    (tmp_path / SAVED_CONFIG).write_text("")
    earlier_metrics(tmp_path / "checkpoints/last.ckpt", checkpoint)
    assert {(tmp_path / name).read_text() for name in own} == {"first\n"}
    assert {(tmp_path / name).read_text() for name in foreign} == {"first\nsecond"}


def test_short_lived_files_lie_in_memory_where_they_fit_there(disk, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("fuchsia_pl.files.RAM_BACKED", disk)
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    assert roomy_folder(4 << 20, "it") == disk
    fill(disk, spare=1 << 20)
    assert roomy_folder(1 << 20, "it") == disk
    assert roomy_folder((1 << 20) + 1, "it") == elsewhere
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    with pytest.raises(ConfigError, match=r"^it needs 2\.1 MB for short-lived files, and 1\.0 MB are free in .*TMPDIR"):
        roomy_folder(2 << 20, "it")
    monkeypatch.setattr("fuchsia_pl.files.RAM_BACKED", tmp_path / "there is none")
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    assert roomy_folder(1, "it") == elsewhere


@pytest.mark.parametrize(("num_local_ranks", "is_in_memory"), [(1, True), (2, False)])
def test_a_sync_asks_for_the_room_of_all_ranks_of_its_machine(
    tiny_model, disk, tmp_path, monkeypatch, num_local_ranks, is_in_memory
):
    """A rank writes two versions of at least 1 MiB each: one rank fits into 4 MiB, two do not."""
    monkeypatch.setattr("fuchsia_pl.files.RAM_BACKED", disk)
    monkeypatch.setattr("lightning.pytorch.Trainer.num_devices", property(lambda trainer: num_local_ranks))
    used = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *args):
            used.append(any(disk.iterdir()))

    module = make_module(tiny_model)
    make_trainer(tmp_path / "run", Watch(), sync=AdapterSync(tolerance=1e-3), max_steps=1).fit(
        module, datamodule=make_data(module)
    )
    assert used == [is_in_memory]


class Full(Callback):
    """Fills a disk after the second step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            fill(self.folder)


def test_a_sync_that_finds_no_room_in_memory_goes_elsewhere_and_one_that_loses_it_is_one_line(
    tiny_model, disk, tmp_path, monkeypatch
):
    monkeypatch.setattr("fuchsia_pl.files.RAM_BACKED", disk)
    used = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *args):
            used.append([folder.name for folder in disk.iterdir() if folder.is_dir()])

    def fit(*callbacks):
        module = make_module(tiny_model)
        make_trainer(tmp_path / "run", *callbacks, sync=AdapterSync(tolerance=1e-3)).fit(
            module, datamodule=make_data(module)
        )

    with pytest.raises(DiskError, match=r"-sync-\w+/version-2 cannot be written: No space left on device"):
        fit(Full(disk), Watch())
    assert used[0]
    used.clear()
    fit(Watch())  # the disk is full by now
    assert len(used) == 3
    assert not any(name for names in used[1:] for name in names if name not in used[0])
