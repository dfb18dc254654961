"""Logging: our warnings and all errors go to the console and to a file, messages of libraries to the file alone."""

import logging
import os
import sys
from pathlib import Path

from fuchsia_pl.progress import progress

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
LIGHTNING_LOGGERS = ("lightning.fabric", "lightning.pytorch")
OWN_LOGGER = "fuchsia_pl"
PROFILER_LOGGER = "lightning.pytorch.profilers.profiler"


class ConsoleHandler(logging.Handler):
    r"""Writes each message once to stderr, in one line, without a traceback.

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
        """Writes the record, unless the same line was written before."""
        try:
            line = self.line(record)
        except Exception:  # a message that does not fit its arguments: logging reports it and continues
            self.handleError(record)
            return
        if line not in self._written:
            self._written.add(line)
            start = progress.line_start if sys.stderr.isatty() else ""
            sys.stderr.write(f"{start}{line}\n")


class LogFile(logging.FileHandler):
    """A log file that may fail: on a full disk, one line is printed instead of a traceback for each record."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._was_refused = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Prints the file and the reason once. Any other error is about the record, and logging prints it."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._was_refused:
            self._was_refused = True
            sys.stderr.write(
                f"warning: {self.baseFilename} cannot be written ({error.strerror}): the run continues without\n"
            )


def show_warnings() -> None:
    """Writes warnings and errors to stderr, of this package, of Lightning, and of all loggers without handlers."""
    handler = ConsoleHandler(logging.WARNING)
    logging.getLogger().addHandler(handler)
    for name in LIGHTNING_LOGGERS:  # Lightning gives them handlers for all messages when it is imported
        logging.getLogger(name).handlers = [handler]


def chatter_to(run_folder: Path) -> None:
    """Sends messages and warnings of libraries to `run.log` and switches off their progress bars.

    Their errors go to the console too, and messages of this package go to the file too.
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
    # A user who sets trainer.profiler wants to see its table.
    logging.getLogger(PROFILER_LOGGER).handlers = [logging.StreamHandler(sys.stdout)]
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
