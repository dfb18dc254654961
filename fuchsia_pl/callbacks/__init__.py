"""Callbacks of the training loop, one class per file."""
