"""One line that a person has to read, on the console and in the run's log."""

import logging
import sys

# The command sends this logger to `run.log`, and to nothing else.
LOG = logging.getLogger("fuchsia_pl.notices")


def notice(text: str) -> None:
    """Prints a line to stderr, and to `run.log` where the command has opened one.

    Args:
        text: One sentence: what was found, and what to do.
    """
    sys.stderr.write(f"warning: {text}\n")
    if LOG.handlers:
        LOG.warning("%s", text)
