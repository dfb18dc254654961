"""vLLM's processes beside the trainer: where their sockets are, and how they are ended."""

import logging
import multiprocessing
import os
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from fuchsia_pl import orphans

ENGINE_PROCESS = "EngineCore"  # how vLLM's names for its processes begin
SOCKET_FOLDER_VARIABLE = "VLLM_RPC_BASE_PATH"
MAX_SOCKET_FOLDER = 70  # characters: a socket's path has at most 107, and vLLM adds 37
END_TIMEOUT_S = 60.0


def socket_environment(folder: "tempfile.TemporaryDirectory[str] | None") -> dict[str, str]:
    """Has vLLM's sockets made in a folder that goes with them, unless somebody chose one or its path is too long for a socket."""
    if folder is None or SOCKET_FOLDER_VARIABLE in os.environ or len(folder.name) > MAX_SOCKET_FOLDER:
        return {}
    return {SOCKET_FOLDER_VARIABLE: folder.name}


def end_engine_processes() -> None:
    """Kills what vLLM has started in this process and nothing else answers for."""
    for child in multiprocessing.active_children():
        if child.name.startswith(ENGINE_PROCESS) and child.pid is not None:
            orphans.end_tree(child.pid)
            child.join(END_TIMEOUT_S)


def has_ended(error: Exception) -> bool:
    """Whether an error of vLLM is about processes that have ended."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)


def shut_down_late(future: "Future[Any]") -> None:
    """Ends an engine that came up when nobody waited for it any more."""
    if not future.cancelled() and future.exception() is None:
        future.result().shutdown()


def log_to(file: Path) -> None:
    """Points vLLM's logger in this process at the file its worker writes to."""
    logging.getLogger("vllm").handlers = [logging.FileHandler(file)]
