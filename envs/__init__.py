"""Environments that come with Fuchsia-PL; a config names them by class path."""
