"""What an algorithm answers: codes, and what a person may want to know about them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from zeropoint.numerics import blocked
from zeropoint.qtensor import QTensor


class Moments(NamedTuple):
    """Second moments of a layer's inputs, (K, K) float64: means of x x^T. seen: of the inputs that
    codes may be fitted to. unseen: of others, to judge them by; None where none were kept back.
    drift: mean of (x' - x) x^T over those seen, x' being what x was before the layers before were
    quantized; None where it is not asked for.
    """

    seen: Tensor
    unseen: Tensor | None = None
    drift: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The codes of one weight and how they were found.

    algorithm: the one whose codes were kept; not the one asked for when `reason` says why.
    output_error: |(W - Q) X|^2 / |W X|^2 over the calibration inputs X, None without them.
    hessian_gain: tr(H) / tr(D), the most that error feedback can win over rounding (D: the pivots
    of H). limit_gain: tr(H) / (K det(H)^(1/K)), the most that feedback in any order and any
    rotation of the columns can. gap_db: how far output_error is above `error_limit`, in dB.
    damping: share of mean(diag H) that was added to make H positive definite.
    """

    weight: QTensor
    algorithm: str
    reason: str | None = None
    output_error: float | None = None
    hessian_gain: float | None = None
    limit_gain: float | None = None
    gap_db: float | None = None
    damping: float | None = None


def energy(rows: Tensor, hessian: Tensor) -> float:
    """tr(R H R^T). rows: (N, K) float; hessian: (K, K) float, symmetric."""
    r = rows.float()
    return float(((r @ hessian.float()) * r).sum(dtype=torch.float64))


def error_limit(weight: QTensor, original: Tensor, pivots: Tensor, whole: float) -> float:
    """The least relative output error that as many bits allow: 2^(-2R) GM(D) sum var / tr(W H W^T).

    The rate-distortion function of Gaussian weights with a variance for each block, at the R bits
    that a weight takes with its scales, in the norm of H at a high rate: GM(D) = det(H)^(1/K) is
    the geometric mean of the pivots. original: (N, K) float, of energy `whole`; pivots: (K,) > 0.
    """
    scheme = weight.scheme
    bits = 8 * weight.nbytes / original.numel()
    blocks = blocked(original.double(), scheme.granularity, scheme.group_size)
    variance = blocks.var(-1, unbiased=False).sum() * blocks.shape[-1]
    return float(2.0 ** (-2 * bits) * pivots.log().mean().exp() * variance / whole)


def output_error(
    weight: Tensor, image: Tensor, hessian: Tensor, whole: float | None = None
) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = weight - image: the relative squared error of the output.

    weight, image: (N, K) float; hessian: (K, K) float, sum or mean of x x^T. whole: the weight's
    energy, where it is known. 0 where W X = 0.
    """
    if whole is None:
        whole = energy(weight, hessian)
    lost = energy(weight.float() - image.float(), hessian)
    return lost / whole if whole > 0 else 0.0


def measured(choice: Choice, weight: Tensor, hessian: Tensor, whole: float | None = None) -> Choice:
    """The choice with its output error filled in. Arguments as `output_error` takes them."""
    image = choice.weight.dequantize(torch.float32)
    return replace(choice, output_error=output_error(weight, image, hessian, whole))
