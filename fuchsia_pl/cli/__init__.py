"""The `fuchsia` command."""

from fuchsia_pl.cli.app import FuchsiaCLI
from fuchsia_pl.cli.main import main

__all__ = ["FuchsiaCLI", "main"]
