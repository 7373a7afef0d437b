"""The range of a typical batch."""

from __future__ import annotations

from torch import Tensor

from zeropoint.errors import RecipeError
from zeropoint.observers.ranges import Range


class MovingAverageObserver:
    """low = momentum * low + (1 - momentum) * min x, batch by batch; high likewise with max.

    It starts with the first batch. Section 3 of arXiv:1712.05877.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        if not 0 <= momentum < 1:
            raise RecipeError(f"momentum={momentum} is not in [0, 1); use 0.9")
        self._momentum = momentum
        self._low = self._high = 0.0
        self._samples = 0

    def update(self, x: Tensor) -> None:
        """x: (T, K) float, finite; padding left out already. One call is one batch."""
        if not x.numel():
            return
        low, high = (float(v) for v in x.detach().aminmax())
        old = self._momentum if self._samples else 0.0
        self._low = old * self._low + (1 - old) * low
        self._high = old * self._high + (1 - old) * high
        self._samples += len(x)

    def result(self) -> Range:
        """The averages so far."""
        return Range(self._low, self._high, self._samples)

    def __str__(self) -> str:
        return f"moving_average {self._momentum:g}"
