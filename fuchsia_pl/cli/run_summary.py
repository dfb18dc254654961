"""What a run folder tells about its run, read from small files. Imports no torch and never fails on a broken file."""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fuchsia_pl.cli.run_folder import SAVED_CONFIG, TRAINING, kind_of
from fuchsia_pl.run_record import RECORD_FILE, RunRecord, read_record

METRICS_FILE = "metrics.csv"
HELD_OUT_FILE = "held_out.jsonl"
REWARD = "reward/mean"
# The held-out figure that stands for a run: the first of these that it has.
MAIN_FIGURES = ("rollout/accuracy", REWARD)
SPLITS = ("validation", "test")
NO_RECORD = "unknown"
NO_RUN = "no run"


@dataclass(frozen=True)
class HeldOutFigure:
    """A figure of one held-out evaluation.

    Attributes:
        metric: Its name, such as "rollout/accuracy".
        value: Its value.
        low: Lower end of its 95 % interval; None if the run has none.
        high: Upper end.
        step: Optimizer steps of the policy.

    >>> HeldOutFigure("rollout/accuracy", 0.66, 0.58, 0.74, step=25).value
    0.66
    """

    metric: str
    value: float
    low: float | None
    high: float | None
    step: int


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        name: Folder below the root, such as "quickstart/0".
        folder: Its path.
        config: Name of the config.
        kind: The command, such as "fit"; "" if the folder holds no run.
        outcome: That of `RunRecord.current_outcome`, "unknown" without a record, or "no run".
        reason: Error or signal that ended it.
        host: Machine that it ran on; "" without a record.
        step: Optimizer steps.
        max_steps: Their limit, None without one.
        started_at: Start, UTC; without a record the time of its oldest file.
        duration_s: Seconds until its end, or until now if it runs; None if unknown.
        size_bytes: Bytes on the disk.
        rewards: Mean rewards of the training steps.
        held_out: The main figure of each held-out evaluation, in the order of the file.
        version: Version of Fuchsia-PL; "" without a record.

    >>> RunSummary("a/0", Path("runs/a/0"), "a", "fit", "finished").best is None
    True
    """

    name: str
    folder: Path
    config: str
    kind: str
    outcome: str
    reason: str = ""
    host: str = ""
    step: int = 0
    max_steps: int | None = None
    started_at: datetime | None = None
    duration_s: float | None = None
    size_bytes: int = 0
    rewards: list[float] = field(default_factory=list)
    held_out: list[HeldOutFigure] = field(default_factory=list)
    version: str = ""

    @property
    def best(self) -> HeldOutFigure | None:
        """The best held-out figure, the first of several equal ones."""
        return max(self.held_out, key=lambda figure: figure.value, default=None)


def summaries(root: Path) -> list[RunSummary]:
    """The runs under a root, or those of one config, the newest first.

    Folders beside runs that hold no run are listed too.
    """
    found = [summary(folder, root) for folder in _candidates(root)]
    start = datetime.min.replace(tzinfo=UTC)
    return sorted(found, key=lambda run: (run.started_at or start, run.name), reverse=True)


def summary(folder: Path, root: Path) -> RunSummary:
    """The summary of a folder."""
    name = str(folder.relative_to(root)) if folder.is_relative_to(root) and folder != root else str(folder)
    record = read_record(folder)
    size, oldest, newest = _measure(folder)
    if not _is_run(folder):
        return RunSummary(name, folder, folder.parent.name, "", NO_RUN, started_at=oldest, size_bytes=size)
    table = _columns(folder / METRICS_FILE)
    rewards = [value for _, value in table.get(REWARD, [])]
    held_out = _held_out(folder / HELD_OUT_FILE) or _held_out_rows(table)
    kind = record.command if record is not None else kind_of(folder.name)
    started = _time(record.started_at) if record is not None else None
    step = record.step if record is not None else max((int(at) + 1 for at, _ in table.get(REWARD, [])), default=0)
    return RunSummary(
        name,
        folder,
        folder.absolute().parent.name,
        kind,
        outcome=record.current_outcome if record is not None else NO_RECORD,
        reason=record.reason if record is not None else "",
        host=record.host if record is not None else "",
        step=step,
        max_steps=record.max_steps if record is not None else None,
        started_at=started or oldest,
        duration_s=_duration(record, started, newest),
        size_bytes=size,
        rewards=rewards,
        held_out=held_out,
        version=record.version if record is not None else "",
    )


def is_training(run: RunSummary) -> bool:
    """Whether a run trains."""
    return run.kind == TRAINING


def _is_run(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (SAVED_CONFIG, RECORD_FILE))


def _candidates(root: Path) -> list[Path]:
    """Run folders at and below the root, and their neighbours."""
    if _is_run(root):
        return [root]
    found: list[Path] = []
    for parent in [root, *_subfolders(root)]:
        folders = _subfolders(parent)
        if any(_is_run(folder) for folder in folders):
            # At the root itself, the folders of configs are no foreign ones.
            found += folders if parent != root else [folder for folder in folders if _is_run(folder)]
    return found


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []


def _measure(folder: Path) -> tuple[int, datetime | None, datetime | None]:
    """Bytes in a folder, and the times of its oldest and its newest file. A file with several names counts once."""
    size = 0
    times: list[float] = []
    seen: set[tuple[int, int]] = set()
    for entry in _files(folder):
        try:
            facts = entry.stat(follow_symlinks=False)
        except OSError:  # removed meanwhile
            continue
        times.append(facts.st_mtime)
        if facts.st_nlink == 1 or (facts.st_dev, facts.st_ino) not in seen:
            seen.add((facts.st_dev, facts.st_ino))
            size += facts.st_size
    if not times:
        return 0, None, None
    return size, datetime.fromtimestamp(min(times), UTC), datetime.fromtimestamp(max(times), UTC)


def _files(folder: Path) -> "Iterator[os.DirEntry[str]]":
    waiting = [os.fspath(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        yield entry
        except OSError:
            continue


def _duration(record: RunRecord | None, started: datetime | None, newest: datetime | None) -> float | None:
    if record is None or started is None:
        return None
    if record.ended_at is not None:
        ended = _time(record.ended_at)
    elif record.current_outcome == "running":
        ended = datetime.now(UTC)
    else:  # killed: its last sign of life
        ended = newest
    return None if ended is None else max((ended - started).total_seconds(), 0.0)


def _time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _columns(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The columns that a summary uses: pairs of step and value, without empty and broken cells."""
    wanted = {REWARD, *(f"{split}/{name}" for split in SPLITS for name in MAIN_FIGURES)}
    columns: dict[str, list[tuple[float, float]]] = {}
    try:
        whole, _, _ = path.read_text(errors="replace").rpartition("\n")
        header, *rows = csv.reader(whole.splitlines())
    except (OSError, ValueError, csv.Error):
        return {}
    places = {name: place for place, name in enumerate(header) if name in wanted}
    if "step" not in header:
        return {}
    at = header.index("step")
    for row in rows:
        for name, place in places.items():
            step, value = (_number(row[i]) if len(row) == len(header) else None for i in (at, place))
            if step is not None and value is not None:
                columns.setdefault(name, []).append((step, value))
    return columns


def _held_out_rows(table: Mapping[str, list[tuple[float, float]]]) -> list[HeldOutFigure]:
    for name in MAIN_FIGURES:
        for split in SPLITS:
            rows = table.get(f"{split}/{name}", [])
            if rows:
                return [HeldOutFigure(name, value, None, None, int(step)) for step, value in rows]
    return []


def _held_out(path: Path) -> list[HeldOutFigure]:
    """The main figure of each evaluation in `held_out.jsonl`, of the first environment."""
    lines = list(_json_lines(path))
    for name in MAIN_FIGURES:
        rows = [line for line in lines if name in line["figures"]]
        rows = [row for row in rows if row.get("environment") == rows[0].get("environment")]
        figures = [_figure(name, row) for row in rows]
        if any(figures):
            return [figure for figure in figures if figure is not None]
    return []


def _figure(name: str, line: Mapping[str, Any]) -> HeldOutFigure | None:
    given = line["figures"][name]
    values = [_number(given.get(key)) if isinstance(given, dict) else None for key in ("value", "low", "high")]
    step = _number(line.get("step"))
    if values[0] is None or step is None:
        return None
    return HeldOutFigure(name, values[0], values[1], values[2], int(step))


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError:
        return
    for line in lines:
        try:
            loaded = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(loaded, dict) and isinstance(loaded.get("figures"), dict):
            yield loaded


def _number(value: object) -> float | None:
    """A finite number.

    >>> _number("0.5"), _number("nan"), _number(""), _number(None)
    (0.5, None, None, None)
    """
    try:
        number = float(value)  # type: ignore[arg-type]  # anything else is refused below
    except (TypeError, ValueError):
        return None
    return number if abs(number) < float("inf") else None
