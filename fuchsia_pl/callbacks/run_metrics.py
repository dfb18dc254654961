"""`metrics.csv`: one file with all steps, including those before a resume."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from fuchsia_pl.callbacks.last_row import ROW_KEY
from fuchsia_pl.files import append_lines, replacing, writing

METRICS_FILE = ExperimentWriter.NAME_METRICS_FILE

Row = dict[str, str]


class RunMetrics(CSVLogger):
    """Lightning's CSV log in a run folder. A full disk or a kill leaves it intact, and it starts with the rows of a resumed run.

    Args:
        folder: The run folder, `<root>/<config name>/<n>`.
        earlier: Rows of the run that this one resumes, see `rows_before`. They are first in the file.
    """

    def __init__(self, folder: Path, earlier: Sequence[Row] = ()) -> None:
        super().__init__(save_dir=folder.parent.parent, name=folder.parent.name, version=folder.name)
        self.earlier = earlier

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsWriter":
        """The writer, created at the first use."""
        if not isinstance(self._experiment, MetricsWriter):
            self._experiment = MetricsWriter(self.log_dir, self.earlier)
        return self._experiment


class MetricsWriter(ExperimentWriter):
    """Appends complete rows, and replaces the file if a new metric changes its header.

    Args:
        log_dir: The run folder.
        earlier: Rows that are first in the file.
    """

    def __init__(self, log_dir: str, earlier: Sequence[Row]) -> None:
        with writing(Path(log_dir)):
            super().__init__(log_dir)
        # Lightning's rows contain numbers; rows from a file contain text.
        self.metrics: list[Any] = [dict(row) for row in earlier]
        self._written_keys: list[str] = []

    def log_hparams(self, params: dict[str, object]) -> None:
        """Writes `hparams.yaml`."""
        with writing(Path(self.log_dir) / self.NAME_HPARAMS_FILE):
            super().log_hparams(params)

    def save(self) -> None:
        """Writes the rows that were logged since the last call.

        Raises:
            DiskError: They could not be written. The file is unchanged.
        """
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        self._record_new_keys()
        if self._written_keys != self.metrics_keys:
            rows = [*(read_rows(path) if path.exists() else []), *self.metrics]
            with replacing(path) as partial:
                partial.write_text(self._lines(rows, with_header=True), newline="")
        else:
            append_lines(path, self._lines(self.metrics, with_header=False))
        self.metrics, self._written_keys = [], list(self.metrics_keys)

    def _lines(self, rows: Sequence[Row], with_header: bool) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys)
        if with_header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def rows_before(folder: Path, checkpoint: Mapping[str, Any]) -> list[Row]:
    """Rows of the steps up to a checkpoint. The last one is read from the checkpoint if the file does not contain it.

    Args:
        folder: The run folder.
        checkpoint: The checkpoint from which another run continues. Steps are counted from 0 in both.
    """
    path, num_steps = folder / METRICS_FILE, checkpoint["global_step"]
    logged = read_rows(path) if path.is_file() else []
    rows = [row for row in logged if row.get("step", "").isdecimal() and int(row["step"]) < num_steps]
    last = {str(name): str(value) for name, value in checkpoint.get(ROW_KEY, {}).items()}
    # Other callbacks log further rows with other metrics for the same step.
    is_logged = any(row["step"] == last.get("step") and all(row.get(name) for name in last) for row in rows)
    if last and not is_logged:
        rows.append(last)
    return rows


def read_rows(path: Path) -> list[Row]:
    """Rows of a metrics file, without incomplete ones and those that do not match the header."""
    whole, _, _ = path.read_text(errors="replace").rpartition("\n")
    return [row for row in csv.DictReader(whole.splitlines()) if None not in row and None not in row.values()]
