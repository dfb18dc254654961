"""Freed memory returns to the system, and a run of many steps needs no more memory than one of few."""

import csv
import subprocess
import sys

import pytest
from lightning.pytorch.loggers import CSVLogger

from fuchsia_pl.callbacks import memory
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.memory import MemoryReport, resident_bytes, return_freed
from tests.doubles import RecordedEngine, make_data, make_module, make_trainer

MB = 2**20


def test_what_was_freed_between_blocks_in_use_is_returned():
    blocks = [bytearray(60_000) for _ in range(4000)]  # below the size from which glibc maps each block separately
    kept, before = blocks[::2], resident_bytes()
    del blocks
    assert resident_bytes() > before - 10 * MB  # still in the process, as free blocks
    return_freed()
    assert resident_bytes() < before - 80 * MB
    assert len(kept) == 2000


def test_other_ranks_are_left_out_with_what_they_started():
    """A process with a child, each with 100 MB in addition to Python's own memory."""
    grow = f"import subprocess, sys; kept = b'x' * {100 * MB}; "
    child = f"{grow} print(flush=True); input()"
    rank = subprocess.Popen(
        [sys.executable, "-S", "-c", f"{grow} subprocess.run([sys.executable, '-S', '-c', {child!r}])"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        rank.stdout.readline()
        both, ours = resident_bytes(), resident_bytes([rank.pid])
        assert both - ours > 200 * MB
    finally:
        rank.communicate(b"\n")


def fit(folder, root, callback, num_steps):
    module = make_module(folder)
    data = make_data(module, RecordedEngine(), batch_size=4, steps_per_epoch=num_steps, sampling={"max_length": 60})
    settings = {"log_every_n_steps": 1, "logger": CSVLogger(root, name="", version=""), "max_steps": num_steps}
    make_trainer(root, callback, sync=AdapterSync(tolerance=100.0), **settings).fit(module, datamodule=data)
    with (root / "metrics.csv").open() as stream:
        return [float(row["perf/memory_gb"]) * 1024 for row in csv.DictReader(stream)]


def test_sixty_steps_take_the_memory_of_twenty(tiny_model, tmp_path):
    used = fit(tiny_model, tmp_path, MemoryReport(), 60)
    assert len(used) == 60
    first, last = used[20:30], used[50:]
    assert sum(last) / 10 - sum(first) / 10 < 10.0  # MB; a step that kept 0.4 MB would exceed it


@pytest.mark.parametrize("returns", [True, False])
def test_whether_it_is_returned_is_a_setting(tiny_model, tmp_path, monkeypatch, returns):
    calls = []
    monkeypatch.setattr(memory, "return_freed", lambda: calls.append(1))
    fit(tiny_model, tmp_path, MemoryReport(returns=returns), 3)
    assert len(calls) == (3 if returns else 0)
