"""Reads the file of an offline run of Weights & Biases, which is a LevelDB log of protocol buffers."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK_BYTES = 1 << 15
FILE_HEADER_BYTES = 7
HEADER = struct.Struct("<IHB")  # checksum, length, and type: 1 whole, 2 first, 3 middle, 4 last part of a record


def read_records(file: Path) -> Iterator[Record]:
    """All records, in order."""
    content, at, parts = file.read_bytes(), FILE_HEADER_BYTES, b""
    assert content.startswith(b":W&B")
    while at + HEADER.size <= len(content):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < HEADER.size:
            at += left  # the end of a block is filled with zeros
            continue
        _, length, kind = HEADER.unpack_from(content, at)
        if at + HEADER.size + length > len(content):
            return  # the record is being written
        parts += content[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def whole(file: Path, timeout_s: float = 60.0) -> list[Record]:
    """All records of a run that has ended: another process writes them, and its last one is the exit."""
    deadline = time.monotonic() + timeout_s
    while True:
        records = list(read_records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"{file} has no end after {timeout_s} s"
        time.sleep(0.1)


def items_of(items: Any) -> dict[str, Any]:
    """Keys and values of a record's items. A nested key is joined by dots."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def read_run(folder: Path) -> dict[str, Any]:
    """Name, config, summary, history, axes, artifacts and exit code of the one run in a folder."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found: dict[str, Any] = {"config": {}, "summary": {}, "history": [], "axes": {}, "artifacts": [], "exit": None}
    for record in whole(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["name"], found["project"] = record.run.display_name, record.run.project
            found["config"] |= items_of(record.run.config.update)
        elif kind == "config":
            found["config"] |= items_of(record.config.update)
        elif kind == "summary":
            found["summary"] |= items_of(record.summary.update)
        elif kind == "history":
            found["history"].append(items_of(record.history.item))
        elif kind == "metric":
            found["axes"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            found["artifacts"].append(record.artifact)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            found["artifacts"].append(record.request.log_artifact.artifact)
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found
