"""Questions that want a computation, and an IPython interpreter to make it with."""
