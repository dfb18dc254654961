"""`fuchsia report`: makes the report of a run, or lays the curves of several runs over each other."""

import sys
from pathlib import Path

from fuchsia_pl.cli.find_run import find_run
from fuchsia_pl.cli.options import report_options
from fuchsia_pl.files import DiskError
from fuchsia_pl.report.run_data import REPORT_FILE, RolloutReader, run_summary, write_report
from fuchsia_pl.types import ConfigError


def report(words: list[str]) -> int:
    """Makes the report of a command line and prints its path; returns the exit code."""
    parser = report_options()
    given = parser.parse_args(words)
    try:
        folders = [find_run(run, given.root) for run in given.runs]
        output = _output(given.output, folders[0])
        if given.max_rollouts < 0:
            raise ConfigError(f"--max_rollouts must be 0 or more, got {given.max_rollouts}")
    except ConfigError as error:
        parser.error(str(error))
    reader = RolloutReader(folders[0], given.max_rollouts)
    reader.read()
    try:
        write_report(output, reader, [run_summary(folder) for folder in folders])
    except DiskError as error:
        parser.exit(1, f"error: {error}\n")
    sys.stdout.write(f"{output}\n")
    return 0


def _output(given: Path | None, folder: Path) -> Path:
    """The file to write.

    Raises:
        ConfigError: It is a folder.
    """
    output = folder / REPORT_FILE if given is None else given
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder: give the name of a file, such as {output / REPORT_FILE}")
    return output
