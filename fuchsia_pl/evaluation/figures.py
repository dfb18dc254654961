"""A measured figure with its interval."""

from dataclasses import dataclass

COVERAGE = 0.95


@dataclass(frozen=True)
class Figure:
    """A figure of some items, such as a mean reward, with its 95 % interval.

    Attributes:
        value: The figure.
        low: Lower end of the interval, NaN if one item alone gives none.
        high: Upper end of the interval, NaN if one item alone gives none.

    >>> str(Figure(0.65625, 0.5343, 0.7611))
    '0.656 [0.534, 0.761]'
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """The figure and its interval in three decimals, or in one from 100 on."""
        digits = 3 if abs(self.value) < 100 else 1
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"
