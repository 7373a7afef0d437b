"""The range that clips nothing."""

from __future__ import annotations

import math

from torch import Tensor

from zeropoint.observers.ranges import Range


class MinMaxObserver:
    """low = min x; high = max x."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf
        self._samples = 0

    def update(self, x: Tensor) -> None:
        """x: (T, K) float, finite; padding left out already."""
        if x.numel():
            low, high = (float(v) for v in x.detach().aminmax())
            self._low, self._high = min(self._low, low), max(self._high, high)
            self._samples += len(x)

    def result(self) -> Range:
        """Smallest and largest value seen."""
        if not self._samples:
            return Range(0.0, 0.0, 0)
        return Range(self._low, self._high, self._samples)

    def __str__(self) -> str:
        return "minmax"
