"""Environments that come with Fuchsia-PL, imported as `fuchsia_pl.library`. A config names them by class path."""
