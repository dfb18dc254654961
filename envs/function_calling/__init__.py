"""Questions that require a computation, and an IPython interpreter as a tool."""
