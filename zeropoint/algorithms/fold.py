"""Per-channel balance of activations and weights (AWQ, arXiv:2306.00978; SmoothQuant).

x_j w_j = (x_j / s_j) (w_j s_j): a channel with large inputs and small weights gets larger weights,
which are stored with the same error as the others of their group, and so with less error in the
output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.numerics import Format

SMALLEST = 1e-4  # of the mean square: channels that are never used move no further than this
LARGEST_FACTOR = 32.0


def balance(activations: Tensor, weights: Tensor) -> Tensor:
    """s = sqrt(rms of the activation / rms of the weight column), with geometric mean 1.

    activations, weights: (K,) float, mean squares. Returns (K,) float64 > 0.
    """
    parts = []
    for mean_square in (activations.double(), weights.double()):
        parts.append(mean_square.clamp_min(SMALLEST * mean_square.mean()).clamp_min(1e-30))
    s = (parts[0] / parts[1]) ** 0.25
    s = s / s.log().mean().exp()
    return s.clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)


def helps(fmt: Format) -> bool:
    """Whether a format's error depends on the size of its neighbours in the group at all: that of
    a downcast or a float8 is relative to each value.
    """
    return fmt.kind in ("integer", "codebook", "vector")


def propagated(weight: Tensor, hessian: Tensor, cross: Tensor, alpha: float) -> Tensor:
    """Weights that make up for what the layers before have lost (QEP): W + alpha W C (H + dI)^-1.

    weight: (N, K) float; hessian: (K, K), mean of y y^T of the quantized model's inputs; cross:
    (K, K), mean of (x - y) y^T; d = 1 % of mean(diag H). alpha = 1 would make W y nearest to the
    original W x. Returns (N, K) of the weight's dtype; the weight itself where H is singular.
    """
    damped = hessian.to(torch.float64, copy=True)
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0 or not torch.isfinite(cross).all():
        return weight
    correction = torch.cholesky_solve((weight.double() @ cross.double()).T, factor).T
    return (weight.double() + alpha * correction).to(weight.dtype)
