"""vLLM's processes beside the trainer: their sockets, their health and their end."""

import asyncio
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from fuchsia_pl import orphans
from fuchsia_pl.loop import cancel_others

T = TypeVar("T")

ENGINE_PROCESS = "EngineCore"  # prefix of the names of vLLM's processes
SOCKET_FOLDER_VARIABLE = "VLLM_RPC_BASE_PATH"
MAX_SOCKET_FOLDER = 70  # characters: a socket's path has at most 107, and vLLM adds 37
END_TIMEOUT_S = 60.0
LOOK_S = 0.5


def socket_environment(folder: "tempfile.TemporaryDirectory[str] | None") -> dict[str, str]:
    """Variable that puts vLLM's sockets into a folder that is removed with them; none if it is set or the path is too long."""
    if folder is None or SOCKET_FOLDER_VARIABLE in os.environ or len(folder.name) > MAX_SOCKET_FOLDER:
        return {}
    return {SOCKET_FOLDER_VARIABLE: folder.name}


def end_engine_processes() -> None:
    """Kills the engine processes that vLLM has started from this process, and their children."""
    for child in multiprocessing.active_children():
        if child.name.startswith(ENGINE_PROCESS) and child.pid is not None:
            orphans.end_tree(child.pid)
            child.join(END_TIMEOUT_S)


def has_ended(error: Exception) -> bool:
    """Whether an error of vLLM reports that its processes have ended."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)


async def while_alive(llm: Any, order: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Awaits a call to vLLM's processes. If these end, vLLM fails the requests but never answers other calls.

    Raises:
        EngineDeadError: The processes have ended.
    """
    task = asyncio.ensure_future(order())
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
            if llm.errored:
                raise llm.dead_error
        return task.result()
    finally:
        task.cancel()


async def shut_down(llm: Any, timeout_s: float) -> None:
    """Ends vLLM's processes and the tasks of its event loop."""
    llm.shutdown()
    await cancel_others(timeout_s)


def shut_down_late(future: "Future[Any]") -> None:
    """Ends an engine that became ready after its start was abandoned."""
    if not future.cancelled() and future.exception() is None:
        future.result().shutdown()


def log_to(file: Path) -> None:
    """Sends vLLM's logger in this process to the file that its worker writes to."""
    log = logging.getLogger("vllm")
    for handler in log.handlers:
        handler.close()  # log file of the engine before a restart
    log.handlers = [logging.FileHandler(file)]
