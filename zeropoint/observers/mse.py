"""The range of least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.numerics import FORMATS, Format
from zeropoint.numerics.activations import round_static
from zeropoint.observers.histogram import Bins, Histogram
from zeropoint.observers.ranges import Range

OCTAVES = 16  # the smallest range that is tried is 2^-16 of the largest value
ROUNDS = 2


class MseObserver:
    """low, high = argmin E[(x - round(x))^2], over ranges inside the one that was seen.

    Values are taken to be spread evenly in their bin of the histogram; the error of the grid,
    clipping included, is then exact. Searched are first ranges [-t, t], cut to what was seen,
    then each end by itself. The range that was seen is among the candidates.
    """

    def __init__(self, format: str = "int8") -> None:
        self._format = FORMATS[format]
        self._histogram = Histogram()

    def update(self, x: Tensor) -> None:
        """x: (T, K) float, finite; padding left out already."""
        self._histogram.update(x)

    def result(self) -> Range:
        """The best range for what was seen so far."""
        seen = self._histogram.seen
        if max(-seen.low, seen.high) <= 0:
            return seen
        bins = self._histogram.bins()
        if self._format.kind == "float8":
            candidates = thresholds(max(-seen.low, seen.high), per_octave=8)
            errors = torch.stack([float8_error(bins, t, self._format) for t in candidates])
            best = float(candidates[errors.argmin()])
            return Range(-best, best, seen.samples)
        low, high = _search(bins, seen)
        return Range(low, high, seen.samples)

    def __str__(self) -> str:
        return "mse"


def thresholds(largest: float, per_octave: int = 2) -> Tensor:
    """largest * 2^(-j / per_octave), falling. Returns (C,) float64."""
    steps = torch.arange(OCTAVES * per_octave, dtype=torch.float64) / per_octave
    return largest * torch.exp2(-steps)


def _near(end: float) -> Tensor:
    """end * 2^(j / 16), within an octave, `end` first. Returns (C,) float64."""
    steps = torch.arange(1, 17, dtype=torch.float64) / 16
    return end * torch.exp2(torch.cat([torch.zeros(1), steps, -steps]))


def _search(bins: Bins, seen: Range) -> tuple[float, float]:
    """low <= 0 and high >= 0 of least error."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)

    def best(lows: Tensor, highs: Tensor) -> tuple[float, float]:
        lows, highs = lows.clamp_min(low), highs.clamp_max(high)
        i = int(int8_errors(bins, lows, highs).argmin())
        return float(lows[i]), float(highs[i])

    t = thresholds(max(-low, high))
    now = best(-t, t)
    t = _near(max(-now[0], now[1]))
    now = best(*(torch.cat([torch.tensor([e]), s]) for e, s in zip(now, (-t, t), strict=True)))
    for _ in range(ROUNDS):
        if low < 0:
            tried = torch.cat([_near(now[0]), thresholds(low)])
            now = best(tried, torch.full_like(tried, now[1]))
        if high > 0:
            tried = torch.cat([_near(now[1]), thresholds(high)])
            now = best(torch.full_like(tried, now[0]), tried)
    return now


def int8_errors(bins: Bins, low: Tensor, high: Tensor) -> Tensor:
    """Mean of (x - round(x))^2 over the bins, for the grids of some ranges.

    low <= 0 <= high: (C,) float64, not both 0. Returns (C,) float64.

    In steps u = x / s, n = clamp(round(u), n_min, n_max) and F(u) = n / 12 + (u - n)^3 / 3 is an
    integral of (u - n)^2, so a bin [a, b] has the mean s^2 (F(b) - F(a)) / (b - a).
    """
    int8 = FORMATS["int8"]
    step = ((high - low) / (int8.q_max - int8.q_min)).unsqueeze(1)
    zero_point = torch.round(int8.q_min - low.unsqueeze(1) / step)
    n_min, n_max = int8.q_min - zero_point, int8.q_max - zero_point

    def nearest(u: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(torch.round(u), n_min), n_max)

    def integral(u: Tensor) -> Tensor:
        n = nearest(u)
        return n / 12 + (u - n) ** 3 / 3

    a, b = bins.start / step, bins.end / step
    width = b - a
    narrow = width <= 1e-9 * torch.maximum(a.abs(), b.abs())  # F(b) - F(a) would be rounding
    spread = (integral(b) - integral(a)) / torch.where(narrow, 1.0, width)
    error = torch.where(narrow, (a - nearest(a)) ** 2, spread)
    return (error @ bins.mass) / bins.mass.sum() * step.squeeze(1) ** 2


def float8_error(bins: Bins, largest: Tensor, fmt: Format) -> Tensor:
    """Mean of (x - round(x))^2 over the bins' centres, which lie closer than float8's numbers.

    largest: () float64 > 0. Returns () float64.
    """
    centre = (bins.start + bins.end) / 2
    rounded = round_static(centre, largest / fmt.real_max, None, fmt.name)
    return ((centre - rounded) ** 2 * bins.mass).sum() / bins.mass.sum()
