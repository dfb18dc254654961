"""`python -m fuchsia_pl` is `fuchsia`."""

from fuchsia_pl.cli import main

if __name__ == "__main__":
    main()
