"""Sends what libraries say to a file, so that the console shows the run."""

import logging
import os
import sys
from pathlib import Path

LOG_FILE = "run.log"
LOGGERS = (
    "datasets",
    "fastmcp",
    "fuchsia_pl.notices",
    "httpx",
    "huggingface_hub",
    "lightning.fabric",
    "lightning.pytorch",
    "mcp",
    "peft",
    "py.warnings",
    "transformers",
)

PROFILER_LOGGER = "lightning.pytorch.profilers.profiler"


def chatter_to(run_folder: Path) -> None:
    """Points the libraries' loggers, warnings included, at `run.log` and switches their progress bars off."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.captureWarnings(True)
    handler = logging.FileHandler(run_folder / LOG_FILE)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    # Whoever sets trainer.profiler wants to see its table.
    logging.getLogger(PROFILER_LOGGER).handlers = [logging.StreamHandler(sys.stdout)]
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
