"""A histogram of activations, for observers that weigh what a range would clip.

Transformers have activations a thousand times larger than nearly all others, so bins of one width
hold everything in one of them. The bins here are a float32's own leading bits - its sign, its
exponent and 6 bits of its mantissa - and so 1.6 % of their values wide, from 1e-38 to 3e38.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zeropoint.observers.ranges import Range

MANTISSA_BITS = 6
SHIFT = 23 - MANTISSA_BITS
MAGNITUDES = 1 << (8 + MANTISSA_BITS)  # bins of one sign; the upper half of all has the sign bit


class Bins(NamedTuple):
    """The bins that hold something, in rising order. All (B,) float64.

    mass[i] values lie in [start[i], end[i]], which ends where what was seen ends.
    """

    start: Tensor
    end: Tensor
    mass: Tensor

    def below(self, at: Tensor) -> Tensor:
        """How many values are below each of `at`, taken to be spread evenly in their bin.

        at: (A,) float64; returns (A,) float64.
        """
        before = torch.cat([torch.zeros(1, dtype=torch.float64), self.mass.cumsum(0)])
        i = (torch.searchsorted(self.start, at, right=True) - 1).clamp_min(0)
        width = self.end[i] - self.start[i]
        share = torch.where(width > 0, (at - self.start[i]) / width, (at > self.end[i]).double())
        return before[i] + self.mass[i] * share.clamp(0, 1)


class Histogram:
    """Counts of values by their leading bits. The order of updates, and how a tensor is cut into
    them, make no difference.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(2 * MAGNITUDES, dtype=torch.int64)
        self.low, self.high = math.inf, -math.inf
        self.samples = 0

    def update(self, x: Tensor) -> None:
        """x: (T, K) float, finite."""
        if not x.numel():
            return
        values = x.detach().reshape(-1).float()
        low, high = (float(v) for v in values.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        index = (values.view(torch.int32) >> SHIFT) & (2 * MAGNITUDES - 1)
        self._counts += torch.bincount(index, minlength=2 * MAGNITUDES).cpu()
        self.samples += len(x)

    @property
    def seen(self) -> Range:
        """From the smallest to the largest value."""
        return Range(self.low, self.high, self.samples) if self.samples else Range(0.0, 0.0, 0)

    def bins(self) -> Bins:
        """What was seen."""
        bits = torch.arange(MAGNITUDES + 1, dtype=torch.int32) << SHIFT
        edges = bits.view(torch.float32).double()
        start, end = edges[:-1], edges[1:]
        rising = torch.cat([-end.flip(0), start]), torch.cat([-start.flip(0), end])
        count = torch.cat([self._counts[MAGNITUDES:].flip(0), self._counts[:MAGNITUDES]])
        held = count > 0
        low, high = (torch.tensor(v, dtype=torch.float64) for v in (self.low, self.high))
        return Bins(
            start=rising[0][held].clamp(low, high),
            end=rising[1][held].clamp(low, high),
            mass=count[held].double(),
        )
