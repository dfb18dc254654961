"""The smallest MCP server, over stdin and stdout."""

from fastmcp import FastMCP

server: FastMCP = FastMCP("one")


@server.tool
def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


if __name__ == "__main__":
    server.run(show_banner=False, log_level="ERROR")
