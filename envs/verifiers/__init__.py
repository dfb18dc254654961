"""Tasksets and environments of verifiers 0.4 (PrimeIntellect-ai/verifiers), unmodified, in this process.

A config names them by `fuchsia_pl.library.verifiers.VerifiersEnvironment`. The library is imported by the constructor, not by
this package, so that everything else works without it.
"""

from fuchsia_pl.library.verifiers.environment import VerifiersEnvironment

__all__ = ["VerifiersEnvironment"]
