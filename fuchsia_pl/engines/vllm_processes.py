"""vLLM's processes beside the trainer: where their sockets are, and how they are ended."""

import asyncio
import contextlib
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

ENGINE_PROCESS = "EngineCore"  # how vLLM's names for its processes begin
SOCKET_FOLDER_VARIABLE = "VLLM_RPC_BASE_PATH"
MAX_SOCKET_FOLDER = 70  # characters: a socket's path has at most 107, and vLLM adds 37
END_TIMEOUT_S = 60.0
LOOK_S = 0.5
MAX_SETTLE_S = (
    2.0  # vLLM's answers to pause and resume are not waited for longer: those of an engine that died never come
)


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


async def while_alive(llm: Any, order: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Awaits an order to vLLM's processes. vLLM answers requests where these end, and leaves all else unanswered.

    Raises:
        EngineDeadError: They have ended.
    """
    task = asyncio.ensure_future(order())
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
            if llm.errored:
                raise llm.dead_error
        return task.result()
    finally:
        task.cancel()


async def hold(llm: Any) -> None:
    """Lets vLLM schedule the requests of a burst together.

    The rounding of a row depends on the rows beside it. Were the first request scheduled while the others arrive, the batches,
    and with them the last bits of the logprobs, would depend on the moment.
    """
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(llm.pause_generation(mode="keep", clear_cache=False), MAX_SETTLE_S)


async def shut_down(llm: Any, timeout_s: float) -> None:
    """Ends vLLM's processes and the tasks of the event loop that it runs on."""
    llm.shutdown()
    await cancel_others(timeout_s)


def shut_down_late(future: "Future[Any]") -> None:
    """Ends an engine that came up when nobody waited for it any more."""
    if not future.cancelled() and future.exception() is None:
        future.result().shutdown()


def log_to(file: Path) -> None:
    """Points vLLM's logger in this process at the file its worker writes to."""
    log = logging.getLogger("vllm")
    for handler in log.handlers:
        handler.close()  # that of the engine before a restart
    log.handlers = [logging.FileHandler(file)]
