"""Second moments of a layer's inputs, all that a layer-wise least-squares problem needs to know."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 256  # of the matrix, that are summed at a time: from its diagonal on


class Hessian(NamedTuple):
    """matrix: (K, K) float32, the mean of x x^T over `tokens` inputs (0 when there were none)."""

    matrix: Tensor
    tokens: int


class HessianObserver:
    """H = 1/T sum_t x_t x_t^T. Products in float32, their sums in float64."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._tokens = 0

    def update(self, x: Tensor) -> None:
        """x: (T, K) float, padding left out already."""
        wide = x.detach().float()
        for first in range(0, len(self._sum), ROWS):  # symmetric: half of the products are enough
            columns = wide[:, first : first + ROWS]
            self._sum[first : first + ROWS, first:] += columns.T @ wide[:, first:]
        self._tokens += len(x)

    def result(self) -> Hessian:
        """The mean, the observer's last word: the sum, 537 MB of 8192 columns, is let go."""
        total, self._sum = self._sum, self._sum.new_empty(0)
        if self._tokens == 0:  # memory that nobody has touched stays so
            return Hessian(total.new_zeros(total.shape, dtype=torch.float32), 0)
        mean = total.div_(self._tokens).float()
        for end in range(ROWS, len(mean), ROWS):
            mean[end:, end - ROWS : end] = mean[end - ROWS : end, end:].T
        return Hessian(mean, self._tokens)
