"""How far a layer's inputs have drifted from those of the original model, as seen by its inputs."""

from __future__ import annotations

import torch
from torch import Tensor


class CrossObserver:
    """C = 1/T sum_t (x_t - y_t) y_t^T, x: original inputs, y: inputs in the quantized model."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._tokens = 0

    def update(self, original: Tensor, quantized: Tensor) -> None:
        """original, quantized: (T, K) float, the same tokens."""
        y = quantized.detach().float()
        self._sum += (original.detach().float() - y).T @ y
        self._tokens += len(y)

    def result(self) -> Tensor:
        """The mean so far. (K, K) float64."""
        return self._sum / max(1, self._tokens)
