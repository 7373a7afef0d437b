"""How the input of a quantized layer is rounded, as its scheme and its range say.

kernel    int8, a scale for each token: the kernel does it while it multiplies
float     everything else: rounded here, and multiplied by a kernel as any float input
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from zeropoint.numerics.activations import round_but_outliers, round_static, round_tokens
from zeropoint.scheme import Scheme

INPUT_PARTS = ("input_scale", "input_zero_point")
"""Buffers of a layer with a static range: () float32 > 0, and for int8 () int8."""


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """Where the static range of a layer's input comes from.

    observer: its name and options. samples: tokens it saw. low, high: the range it chose.
    """

    observer: str
    samples: int
    low: float
    high: float


def in_kernel(scheme: Scheme, scale: Tensor | None) -> bool:
    """Whether the kernel rounds the input itself, or nothing does. scale: of a static range."""
    dynamic_int8 = scheme.activations == "int8" and scheme.outlier_threshold is None
    return scheme.activations is None or (dynamic_int8 and scale is None)


def rounded(x: Tensor, scheme: Scheme, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """x on the grid of the scheme's activations. x: (..., K) float; the others as `INPUT_PARTS`."""
    if scheme.activations is None:
        return x
    if scale is not None:
        return round_static(x, scale, zero_point, scheme.activations)
    if scheme.outlier_threshold is not None:
        return round_but_outliers(x, scheme.outlier_threshold)
    return round_tokens(x, scheme.activations)


def weight_only(scheme: Scheme) -> Scheme:
    """The scheme of the same weight multiplied by float inputs."""
    return replace(scheme.stored, activations=None, outlier_threshold=None, compute_dtype=None)
