"""The range that changes the distribution of the values least."""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.errors import RecipeError
from zeropoint.numerics import FORMATS
from zeropoint.observers.histogram import Bins, Histogram
from zeropoint.observers.mse import thresholds
from zeropoint.observers.ranges import Range

PIECES = 16  # of a step: as 2048 bins over 128 codes
EMPTY = 1e-4  # mass spread over all bins, so that none is impossible


class KlObserver:
    """low, high = argmin KL(P || Q) over ranges [-t, t], cut to what was seen.

    The criterion of TensorRT (S. Migacz, "8-bit inference with TensorRT", GTC 2017). P: the values,
    clipped, so that what lies outside is added to the outermost bins. Q: the values inside, each
    code's mass spread evenly over those of its bins that hold something. TensorRT's bins are 1/2048
    of the largest value; here they are 1/16 of a step, whatever the range, because one outlier
    would make the others useless. For int8.
    """

    def __init__(self, format: str = "int8") -> None:
        if format != "int8":
            raise RecipeError(
                f"observer='kl' compares the steps of int8, not of {format}; use 'percentile', "
                "'mse' or 'minmax'"
            )
        self._histogram = Histogram()

    def update(self, x: Tensor) -> None:
        """x: (T, K) float, finite; padding left out already."""
        self._histogram.update(x)

    def result(self) -> Range:
        """The best range for what was seen so far."""
        seen = self._histogram.seen
        low, high = min(seen.low, 0.0), max(seen.high, 0.0)
        if high - low <= 0:
            return seen
        bins = self._histogram.bins()
        t = thresholds(max(-low, high), per_octave=8)
        ranges = list(zip((-t).clamp_min(low).tolist(), t.clamp_max(high).tolist(), strict=True))
        divergence = [_divergence(bins, *ends) for ends in ranges]
        best = min(range(len(ranges)), key=divergence.__getitem__)
        return Range(*ranges[best], seen.samples)

    def __str__(self) -> str:
        return "kl"


def _divergence(bins: Bins, low: float, high: float) -> float:
    """KL(P || Q) in nats."""
    int8 = FORMATS["int8"]
    codes = int8.q_max - int8.q_min + 1
    step = (high - low) / (codes - 1)
    edges = low - step / 2 + torch.arange(codes * PIECES + 1, dtype=torch.float64) * step / PIECES
    below = bins.below(edges)
    inside = below.diff()
    p = inside.clone()
    total = bins.mass.sum()
    p[0] += below[0]
    p[-1] += total - below[-1]
    held = (inside > 0).double().view(codes, PIECES)
    mass = inside.view(codes, PIECES).sum(1, keepdim=True)
    q = (mass / held.sum(1, keepdim=True).clamp_min(1) * held).view(-1)
    if not q.sum() > 0:
        return float("inf")
    p, q = p / total, q / q.sum() * (1 - EMPTY) + EMPTY / len(q)
    return float(torch.where(p > 0, p * (p / q).log(), 0.0).sum())
