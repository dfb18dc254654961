import os
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from fuchsia_pl.run_record import RECORD_FILE, RunRecord, read_record, write_record

RECORD = RunRecord(
    "fit", datetime.now(UTC).isoformat(timespec="seconds"), "0.1.0", socket.gethostname(), pid=os.getpid(), max_steps=4
)


def test_a_record_is_read_as_it_was_written(tmp_path):
    write_record(tmp_path, RECORD)
    assert read_record(tmp_path) == RECORD
    write_record(tmp_path, replace(RECORD, outcome="failed", reason='a "b" \n c', step=3))
    assert read_record(tmp_path) == replace(RECORD, outcome="failed", reason='a "b" \n c', step=3)
    assert [file.name for file in tmp_path.iterdir()] == [RECORD_FILE]


def test_a_missing_or_foreign_record_is_none(tmp_path):
    assert read_record(tmp_path) is None
    for text in ("", "[]", "{", '{"command": "fit"}', "\x00"):
        (tmp_path / RECORD_FILE).write_text(text)
        assert read_record(tmp_path) is None


def test_a_run_whose_process_is_gone_was_killed():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=30)
    assert RECORD.current_outcome == "running"
    assert replace(RECORD, pid=process.pid).current_outcome == "killed"
    assert replace(RECORD, pid=process.pid, outcome="finished").current_outcome == "finished"
    assert replace(RECORD, pid=process.pid, host="another").current_outcome == "running"


def test_a_later_process_with_the_same_number_is_not_the_run():
    earlier = (datetime.now(UTC) - timedelta(days=30)).isoformat(timespec="seconds")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        assert replace(RECORD, pid=process.pid, started_at=now).current_outcome == "running"
        assert replace(RECORD, pid=process.pid, started_at=earlier).current_outcome == "killed"
        assert replace(RECORD, pid=process.pid, started_at="a while ago").current_outcome == "running"
    finally:
        process.communicate(timeout=30)
