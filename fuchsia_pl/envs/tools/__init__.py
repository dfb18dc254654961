"""Tools: how a policy's calls are read, and the MCP servers that run them."""
