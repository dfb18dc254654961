"""Toolsets of verifiers as our MCP servers. Each runs in a process of its own, see `server.py`."""

import os
import sys
from pathlib import Path

import verifiers.v1 as vf
from verifiers.v1.state import state_cls

from fuchsia_pl.envs import ConfigError, MCPServer
from fuchsia_pl.library.verifiers.server import CONFIG_VARIABLE, END_SESSION

MODULE = "fuchsia_pl.library.verifiers.server"


def servers_of(task: vf.Task, taskset: vf.Taskset) -> list[MCPServer]:
    """The servers of a task's own toolsets, which keep their state apart for each rollout, and of those of the taskset.

    Args:
        task: Any task of the taskset.
        taskset: The taskset.

    Raises:
        ConfigError: A toolset does not work here.
    """
    own = [_server(toolset, is_shared=False) for toolset in task.toolsets(task.config)]
    return [*own, *(_server(toolset, is_shared=True) for toolset in taskset.toolsets(taskset.config))]


def _server(toolset: vf.Toolset, is_shared: bool) -> MCPServer:
    kind, config = type(toolset), toolset.config
    reason = _refusal(toolset, is_shared)
    if reason is not None:
        raise ConfigError(f"the toolset {kind.__name__} of verifiers {reason}, which does not work here")
    if config.url:
        return MCPServer(url=config.url)
    arguments = [_name(kind), _name(type(config)), *(["--shared"] if is_shared else [])]
    # A server inherits no PYTHONPATH, and -P leaves out the working directory.
    places = os.pathsep.join(str(Path(place).absolute()) for place in sys.path)
    return MCPServer(
        command=[sys.executable, "-P", "-m", MODULE, *arguments],
        env={CONFIG_VARIABLE: config.model_dump_json(), "PYTHONPATH": places},
        end_session_tool=None if is_shared else END_SESSION,
    )


def _refusal(toolset: vf.Toolset, is_shared: bool) -> str | None:
    """The reason why a toolset does not work here; None if it does."""
    kind, config = type(toolset), toolset.config
    is_colocated = isinstance(config, vf.ToolsetConfig) and config.colocated
    if is_colocated or config.runtime.type != "subprocess":
        return "runs in a container or beside a harness program"
    if state_cls(kind) is not vf.State:
        return f"shares the state {state_cls(kind).__name__} with its task"
    if kind.setup_task is not vf.Toolset.setup_task and not is_shared:
        return "is set up for each task by setup_task"
    if kind.register is not vf.Toolset.register:
        return "registers its tools itself"
    if config.url and toolset.server_name:
        return f"is at {config.url!r} and has the prefix {toolset.server_name!r} for its tools (set TOOL_PREFIX = None)"
    if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        return "is defined where no other process can import it"
    return None


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
