"""The console script."""

import os
import sys

from fuchsia_pl.cli.app import FuchsiaCLI
from fuchsia_pl.cli.check_env import check_env
from fuchsia_pl.cli.serve import serve


def main() -> None:
    """Runs the command. Environments are found in the current folder too, as with `python -m`."""
    sys.path.append(os.getcwd())
    if sys.argv[1:2] == ["check-env"]:
        sys.exit(check_env(sys.argv[2:]))
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2:])
    FuchsiaCLI()
