"""Mean square of every input channel."""

from __future__ import annotations

import torch
from torch import Tensor


class MeanSquareObserver:
    """1/T sum_t x_t^2, channel by channel, in float64."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(columns, dtype=torch.float64, device=device)
        self._tokens = 0

    def update(self, x: Tensor) -> None:
        """x: (T, K) float, padding left out already."""
        self._sum += x.detach().float().square().sum(0)
        self._tokens += len(x)

    def result(self) -> Tensor:
        """The mean so far. (K,) float64."""
        return self._sum / max(1, self._tokens)
