"""A real MCP server for the tests: `python tests/tool_server.py [port]`, over stdin and stdout or over HTTP."""

import asyncio
import os
import sys
import time

from fastmcp import Context, FastMCP
from fastmcp.tools import ToolResult

server: FastMCP = FastMCP("test")
counters: dict[str, int] = {}


def key(context: Context) -> str:
    return (context.request_context.meta or {}).get("fuchsia/rollout", "nobody")


@server.tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@server.tool
async def count(context: Context) -> int:
    """Returns the number of calls of this rollout."""
    counters[key(context)] = counters.get(key(context), 0) + 1
    return counters[key(context)]


@server.tool
def count_all() -> int:
    """Returns the number of calls of this process."""
    counters["all"] = counters.get("all", 0) + 1
    return counters["all"]


@server.tool
async def forget(context: Context) -> str:
    """Clears the state of a rollout."""
    return str(counters.pop(key(context), 0))


@server.tool
async def sleep(seconds: float) -> str:
    """Sleeps."""
    await asyncio.sleep(seconds)
    return "slept"


@server.tool
def block(seconds: float) -> str:
    """Sleeps in a thread and ignores its cancellation."""
    time.sleep(seconds)
    return "blocked"


@server.tool
def flood(num_chars: int) -> str:
    """Returns a very long text."""
    return "x" * num_chars


@server.tool
def echo(value) -> str:
    """Returns the type of its argument."""
    return type(value).__name__


@server.tool(output_schema={"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
def misfit() -> ToolResult:
    """Returns a value that violates its own schema."""
    return ToolResult(content="broken", structured_content={"n": "no number"})


@server.tool
def half() -> str:
    """Returns half a surrogate pair."""
    return "a\ud800b"


@server.tool
def fail() -> str:
    """Raises an error."""
    raise ValueError("by hand")


@server.tool
def die() -> str:
    """Ends the process during the call."""
    os._exit(3)


@server.tool
def process() -> int:
    """Returns the id of the process."""
    return os.getpid()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run(transport="http", host="127.0.0.1", port=int(sys.argv[1]), show_banner=False)
    else:
        server.run(show_banner=False)
