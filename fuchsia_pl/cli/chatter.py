"""What goes to the console and what to a file: our warnings and all errors to both, the libraries' chatter to the file."""

import logging
import os
import sys
from pathlib import Path

LOG_FILE = "run.log"
LOGGERS = (
    "datasets",
    "fastmcp",
    "httpx",
    "huggingface_hub",
    "lightning.fabric",
    "lightning.pytorch",
    "mcp",
    "peft",
    "py.warnings",
    "transformers",
)
OWN_LOGGER = "fuchsia_pl"
PROFILER_LOGGER = "lightning.pytorch.profilers.profiler"


class ConsoleHandler(logging.Handler):
    r"""Writes each message once to stderr, in one line; a traceback is for the file.

    >>> handler = ConsoleHandler(logging.WARNING)
    >>> handler.line(logging.LogRecord("fuchsia_pl", logging.WARNING, "", 0, "no %s\nis left", ("server",), None))
    'warning: no server is left'
    """

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._written: set[str] = set()

    def line(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line = f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}"
        error = record.exc_info[1] if record.exc_info else None
        return line if error is None else f"{line} ({type(error).__name__}: {' '.join(str(error).split())})"

    def emit(self, record: logging.LogRecord) -> None:
        """Writes it, unless the same line was written before."""
        try:
            line = self.line(record)
        except Exception:  # a message that does not fit its arguments: logging reports that and goes on
            self.handleError(record)
            return
        if line not in self._written:
            self._written.add(line)
            sys.stderr.write(f"{line}\n")


class LogFile(logging.FileHandler):
    """A log file that a run can do without: where the disk is full, one line follows, and no traceback for each record."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._was_refused = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Names the file and the reason once; any other error is of the record, and logging prints it."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._was_refused:
            self._was_refused = True
            sys.stderr.write(
                f"warning: {self.baseFilename} cannot be written ({error.strerror}): the run continues without\n"
            )


def show_warnings() -> None:
    """Has warnings and errors of this package, and of everything whose logger is not pointed elsewhere, written to stderr."""
    logging.getLogger().addHandler(ConsoleHandler(logging.WARNING))


def chatter_to(run_folder: Path) -> None:
    """Points the libraries' loggers, warnings included, at `run.log` and switches their progress bars off.

    Their errors go to the console too, and what this package logs goes to the file too.
    """
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.captureWarnings(True)
    handler = LogFile(run_folder / LOG_FILE)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    errors = ConsoleHandler(logging.ERROR)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler, errors]
        logger.propagate = False
    logging.getLogger(OWN_LOGGER).handlers = [handler]
    # Whoever sets trainer.profiler wants to see its table.
    logging.getLogger(PROFILER_LOGGER).handlers = [logging.StreamHandler(sys.stdout)]
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
