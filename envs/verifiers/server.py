"""An MCP server with the tools of one toolset of verifiers, over stdin and stdout.

It is started with `python -m fuchsia_pl.library.verifiers.server MODULE:CLASS MODULE:CONFIG [--shared]`. A toolset of a task has
an instance for each rollout, and so a state for each; a shared one has one instance for all.
"""

import argparse
import asyncio
import importlib
import inspect
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any

# The package's other modules are not imported: this process has to start quickly.
CONFIG_VARIABLE = "VERIFIERS_TOOLSET_CONFIG"
END_SESSION = "end_session_of_toolset"
ROLLOUT_KEY = "fuchsia/rollout"  # `_meta` key of `fuchsia_pl.envs.tools.mcp`
SHARED = "shared"


class Instances:
    """The instances of a toolset, each made and set up at its first call.

    Args:
        make: Makes an instance.
        is_shared: Whether all rollouts use one.
    """

    def __init__(self, make: Callable[[], Any], is_shared: bool) -> None:
        self._make = make
        self._is_shared = is_shared
        self._made: dict[str, asyncio.Task[Any]] = {}

    async def of(self, key: str) -> Any:
        """The instance of a rollout.

        Args:
            key: Key of the rollout.
        """
        key = SHARED if self._is_shared else key
        if key not in self._made:
            self._made[key] = asyncio.create_task(self._new())
        try:
            return await asyncio.shield(self._made[key])
        except Exception:  # the next call tries again
            self._made.pop(key, None)
            raise

    async def end(self, key: str) -> None:
        """Ends the instance of a rollout."""
        made = self._made.pop(key, None)
        if made is not None:
            toolset = await made
            await toolset._exit_stack.aclose()  # what its `setup` opened; verifiers closes it likewise

    async def end_all(self) -> None:
        """Ends all instances."""
        for key in list(self._made):
            await self.end(key)

    async def _new(self) -> Any:
        toolset = self._make()
        await toolset.setup()
        return toolset


def make_server(toolset: Any, instances: Instances, is_shared: bool) -> Any:
    """The server.

    Args:
        toolset: An instance that describes the tools and runs none.
        instances: Instances that run them.
        is_shared: Whether there is one for all rollouts.
    """
    from fastmcp import FastMCP
    from fastmcp.tools import FunctionTool
    from verifiers.v1.utils.decorators import discover_decorated

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        if is_shared:  # a setup that fails is an error at the start of the run
            await instances.of(SHARED)
        try:
            yield
        finally:
            await instances.end_all()

    server: Any = FastMCP(type(toolset).__name__, lifespan=lifespan)
    prefix = f"{toolset.server_name}_" if toolset.server_name else ""
    for method in discover_decorated(toolset, "tool"):
        name = prefix + (method.tool_name or method.__name__)
        text = (method.__doc__ or "").strip() or None
        server.add_tool(FunctionTool.from_function(_on_instance(method, instances), name=name, description=text))

    async def end_session() -> str:
        """Ends the toolset's instance of a rollout."""
        await instances.end(_rollout())
        return "ended"

    if not is_shared:
        server.add_tool(FunctionTool.from_function(end_session, name=END_SESSION))
    return server


def _on_instance(method: Callable[..., Any], instances: Instances) -> Callable[..., Any]:
    """A function with the signature of a method, which calls it on the instance of the calling rollout."""

    @wraps(method)
    async def tool(**arguments: Any) -> Any:
        own = await instances.of(_rollout())
        result = getattr(own, method.__name__)(**arguments)
        return await result if inspect.isawaitable(result) else result

    return tool


def _rollout() -> str:
    from fastmcp.server.dependencies import get_context

    request = get_context().request_context
    meta: Any = request.meta if request is not None else None
    return str((meta or {}).get(ROLLOUT_KEY, "default"))


def _imported(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def main() -> None:
    """Serves until stdin is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("toolset")
    parser.add_argument("config")
    parser.add_argument("--shared", action="store_true")
    given = parser.parse_args()
    output, sys.stdout = sys.stdout, sys.stderr  # what a package prints at its import would break the protocol
    kind, config_kind = _imported(given.toolset), _imported(given.config)
    config = config_kind.model_validate_json(os.environ[CONFIG_VARIABLE])
    sys.stdout = output
    instances = Instances(lambda: kind(config), given.shared)
    make_server(kind(config), instances, given.shared).run(show_banner=False)


if __name__ == "__main__":
    main()
