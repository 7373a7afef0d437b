"""The range of nearly all values."""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.errors import RecipeError
from zeropoint.observers.histogram import Histogram
from zeropoint.observers.ranges import Range


class PercentileObserver:
    """low = quantile(1 - percentile / 100); high = quantile(percentile / 100), over all values.

    Exact to a bin of the histogram, 1.6 % of the value.
    """

    def __init__(self, percentile: float = 99.999) -> None:
        if not 50 < percentile <= 100:
            raise RecipeError(
                f"percentile={percentile} is not above 50 and at most 100; use 99.999"
            )
        self._percentile = percentile
        self._histogram = Histogram()

    def update(self, x: Tensor) -> None:
        """x: (T, K) float, finite; padding left out already."""
        self._histogram.update(x)

    def result(self) -> Range:
        """The two quantiles of what was seen so far."""
        seen = self._histogram.seen
        if not seen.samples:
            return seen
        start, end, mass = self._histogram.bins()
        upto = mass.cumsum(0)
        share = self._percentile / 100
        wanted = torch.tensor([1 - share, share], dtype=torch.float64) * upto[-1]
        i = torch.searchsorted(upto, wanted).clamp_max(len(mass) - 1)
        inside = ((wanted - (upto[i] - mass[i])) / mass[i]).clamp(0, 1)
        low, high = (start[i] + inside * (end[i] - start[i])).tolist()
        return Range(low, high, seen.samples)

    def __str__(self) -> str:
        return f"percentile {self._percentile:g}"
