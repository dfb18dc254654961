"""The `fuchsia` command."""

from typing import TYPE_CHECKING, Any

from fuchsia_pl.cli.main import main

if TYPE_CHECKING:
    from fuchsia_pl.cli.app import FuchsiaCLI

__all__ = ["FuchsiaCLI", "main"]


def __getattr__(name: str) -> Any:
    # The class needs Lightning and torch, which take seconds to import. `fuchsia --help` needs neither.
    if name == "FuchsiaCLI":
        from fuchsia_pl.cli.app import FuchsiaCLI

        return FuchsiaCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
