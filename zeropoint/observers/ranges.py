"""What observers of ranges have in common."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Range(NamedTuple):
    """low <= high, both 0 while nothing was seen. samples: tokens seen."""

    low: float
    high: float
    samples: int


class RangeObserver(Protocol):
    """Sees a tensor piece by piece and says which range of it to keep."""

    def update(self, x: Tensor) -> None:
        """x: (T, K) float, finite; padding left out already."""

    def result(self) -> Range:
        """The range for what was seen so far."""

    def __str__(self) -> str:
        """Its name and options, as a table shows them."""
