"""The `fuchsia` command."""

from fuchsia_pl.cli.app import FuchsiaCLI, main

__all__ = ["FuchsiaCLI", "main"]
