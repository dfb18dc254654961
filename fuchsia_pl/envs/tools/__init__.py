"""Tools: parsing of tool calls, and the MCP servers that run them."""
