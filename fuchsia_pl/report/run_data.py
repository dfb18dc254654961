"""The data of a report, read from run folders: of a finished, running, killed or older run."""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fuchsia_pl
from fuchsia_pl.files import replacing
from fuchsia_pl.report.lines import LineReader
from fuchsia_pl.report.metrics import curves, evaluations, read_rows, warnings_of
from fuchsia_pl.report.page.render import render_page
from fuchsia_pl.report.rows import TRAIN
from fuchsia_pl.report.selection import Selection
from fuchsia_pl.report.settings import environment_of, objective_of, settings_of
from fuchsia_pl.report.status import Progress, status_of
from fuchsia_pl.run_record import RunRecord, read_record

REPORT_FILE = "report.html"
MAX_ROLLOUTS = 10_000
FORMAT = 1
# Without a split in its name, it is the log of training. With several ranks, each has its own file.
ROLLOUTS_NAME = re.compile(r"rollouts(?:-(\w+))?\.jsonl(?:\.rank\d+)?")
GAPS_NAME = re.compile(r"gaps\.jsonl(?:\.rank\d+)?")
STEP_SECONDS = "perf/step_seconds"


class RolloutReader:
    """Reads the logs of a run's rollouts, of all splits and ranks. Each call reads what was added since the last.

    Args:
        folder: The run folder.
        max_rollouts: Largest number of rollouts that the page shows.
    """

    def __init__(self, folder: Path, max_rollouts: int = MAX_ROLLOUTS) -> None:
        self.folder = folder
        self.selection = Selection(max_rollouts)
        self._readers: dict[str, LineReader] = {}

    def read(self) -> None:
        """Reads the new lines. Gaps come last, since they belong to rollouts."""
        for match, reader in self._files(ROLLOUTS_NAME):
            for line in reader.new():
                self.selection.add(line, match[1] or TRAIN)
            self.selection.settle()
        for _, reader in self._files(GAPS_NAME):
            for line in reader.new():
                self.selection.add_gaps(line)

    def data(self) -> dict[str, Any]:
        """Tables and rows as the page takes them."""
        data = self.selection.rows()
        default = environment_of(self.folder)
        return {**data, "environments": [name or default for name in data["environments"]]}

    def _files(self, pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], LineReader]]:
        for path in sorted(self.folder.iterdir()):
            match = pattern.fullmatch(path.name)
            if match is not None and path.is_file():
                yield match, self._readers.setdefault(path.name, LineReader(path))


def run_summary(
    folder: Path, record: RunRecord | None = None, rows: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Status, curves, evaluations and settings of a run.

    Args:
        folder: The run folder.
        record: Facts of the run that are newer than its `run.json`; None reads that file.
        rows: Metrics that no file has yet, as rows of `metrics.csv`. Those of steps that the file has are not used.
    """
    logged = read_rows(folder)
    known = set(curves(logged).steps) if rows else set()
    found = curves([*logged, *(row for row in rows if row["step"] + 1 not in known)])
    progress = Progress(max(found.steps, default=0), found.metrics.get(STEP_SECONDS, ()))
    whole_folder = folder.absolute()
    return {
        "name": f"{whole_folder.parent.name}/{whole_folder.name}",
        "folder": str(folder),
        "status": status_of(record or read_record(folder), progress),
        "warnings": warnings_of(folder),
        "steps": found.steps,
        "metrics": found.metrics,
        "evaluations": evaluations(folder, found, environment_of(folder)),
        "config": settings_of(folder),
        "objective": objective_of(folder),
    }


def write_report(output: Path, reader: RolloutReader, runs: Sequence[Mapping[str, Any]]) -> None:
    """Writes the page of one run, with the curves of others laid over its own.

    Args:
        output: The HTML file, which is replaced atomically.
        reader: The rollouts of the first run, which were read.
        runs: What `run_summary` returned for each run.

    Raises:
        DiskError: It could not be written. An older file is unchanged.
    """
    rollouts = reader.data()
    summary = {
        "format": FORMAT,
        "generated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": fuchsia_pl.__version__,
        "runs": list(runs),
        "num_rollouts": reader.selection.num_rollouts,
        "num_shown": reader.selection.num_shown,
        "shown_words": reader.selection.shown_words,
    }
    page = render_page(str(runs[0]["name"]), summary, rollouts)
    with replacing(output) as partial:
        partial.write_text(page, encoding="utf-8")
