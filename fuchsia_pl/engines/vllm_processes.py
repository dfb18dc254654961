"""The processes and sockets that vLLM makes beside the trainer."""

import multiprocessing
import os
import tempfile

from fuchsia_pl import orphans

NAME = "EngineCore"  # how vLLM's names for what it starts begin
JOIN_TIMEOUT_S = 60.0
SOCKET_FOLDER_VARIABLE = "VLLM_RPC_BASE_PATH"
MAX_SOCKET_FOLDER = 70  # characters: a socket's path has at most 107, and vLLM adds 37


def socket_environment(folder: "tempfile.TemporaryDirectory[str] | None") -> dict[str, str]:
    """Has vLLM's sockets made in a folder that goes with them, unless somebody chose one or its path is too long for a socket."""
    if folder is None or SOCKET_FOLDER_VARIABLE in os.environ or len(folder.name) > MAX_SOCKET_FOLDER:
        return {}
    return {SOCKET_FOLDER_VARIABLE: folder.name}


def end_engine_processes() -> None:
    """Kills what vLLM has started in this process and nothing else answers for."""
    for child in multiprocessing.active_children():
        if child.name.startswith(NAME) and child.pid is not None:
            orphans.end_tree(child.pid)
            child.join(JOIN_TIMEOUT_S)
