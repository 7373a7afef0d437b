"""What an algorithm answers: codes, and what a person may want to know about them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zeropoint.qtensor import QTensor


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The codes of one weight and how they were found.

    algorithm: the one whose codes were kept; not the one asked for when `reason` says why.
    output_error: |(W - Q) X|^2 / |W X|^2 over the calibration inputs X, None without them.
    hessian_gain: tr(H) / tr(D), the most that error feedback can win over rounding (D: the pivots
    of H). damping: share of mean(diag H) that was added to make H positive definite.
    """

    weight: QTensor
    algorithm: str
    reason: str | None = None
    output_error: float | None = None
    hessian_gain: float | None = None
    damping: float | None = None


def output_error(weight: Tensor, image: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = weight - image: the relative squared error of the output.

    weight, image: (N, K) float; hessian: (K, K) float, sum or mean of x x^T. 0 where W X = 0.
    """
    h = hessian.to(torch.float32)
    w = weight.to(torch.float32)
    error = w - image.to(torch.float32)
    lost = ((error @ h) * error).sum(dtype=torch.float64)
    total = ((w @ h) * w).sum(dtype=torch.float64)
    return float(lost / total) if total > 0 else 0.0


def measured(choice: Choice, weight: Tensor, hessian: Tensor) -> Choice:
    """The choice with its output error filled in."""
    image = choice.weight.dequantize(torch.float32)
    return replace(choice, output_error=output_error(weight, image, hessian))
