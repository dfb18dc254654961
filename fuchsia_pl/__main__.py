"""Runs the `fuchsia` command as `python -m fuchsia_pl`."""

from fuchsia_pl.cli import main

if __name__ == "__main__":
    main()
