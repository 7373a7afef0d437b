"""Cases and checkers shared by the tests.

Checkers raise AssertionError; `numerics/test_helpers.py` shows that they can.

Rounding slack, used below: u = 2^-24 is the unit roundoff of float32. `normalised = fl(w / s)` is
off by at most u |w / s|, and `image = fl(s * code)` by at most u |image|. A wrong decision between
two neighbouring codes is possible only when the normalised value is that close to their midpoint,
and costs twice the distance to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from hypothesis import settings

from zeropoint.algorithms import get_algorithm
from zeropoint.kernels.reference import weight_values
from zeropoint.nn import QModule
from zeropoint.numerics import FORMATS, Format
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

UNIT_ROUNDOFF = 2.0**-24
SUBNORMAL = 2.0**-149  # smallest positive float32

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40, database=None)

SCALED = [f for f in FORMATS.values() if f.kind != "downcast"]
INTEGERS = [f for f in FORMATS.values() if f.kind == "integer"]
CODEBOOKS = [f for f in FORMATS.values() if f.kind == "codebook"]
DOWNCASTS = [f for f in FORMATS.values() if f.kind == "downcast"]


def symmetries(fmt: Format) -> tuple[bool, ...]:
    """The values of `symmetric` that a format allows."""
    return (True, False) if fmt.kind == "integer" else (True,)


GRIDS = [(f.name, symmetric) for f in SCALED for symmetric in symmetries(f)]
"""(format, symmetric) of everything that has a scale."""


def schemes(group_size: int = 32) -> list[Scheme]:
    """Every format, symmetric or not if it may, per tensor, per channel and per group."""
    result = [Scheme.of(f.name) for f in DOWNCASTS]
    for name, symmetric in GRIDS:
        for granularity in ("tensor", "channel", "group"):
            grouped = granularity == "group"
            result.append(
                Scheme(
                    format=name,
                    granularity=granularity,
                    group_size=group_size if grouped else None,
                    symmetric=symmetric,
                    scale_dtype="float16" if grouped else "float32",
                )
            )
    return result


def defaults() -> list[Scheme]:
    """The default scheme of every format."""
    return [Scheme.of(name) for name in FORMATS]


def example_weight(n: int = 5, k: int = 96, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(n, k) of both signs, with an outlier, a zero row, and a row that is all negative."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    weight[0, 1] = 40.0
    weight[1 % n] = 0.0
    weight[2 % n] = -weight[2 % n].abs()
    return weight.to(dtype)


def rtn(weight: torch.Tensor, scheme: Scheme) -> QTensor:
    """The weight rounded to nearest."""
    return get_algorithm("rtn")(weight.detach(), scheme)


def freeze(module: QModule) -> QModule:
    """Freeze a live module with round to nearest; returns it."""
    module.freeze(rtn(module.float_weight(), module.scheme))
    return module


# --- grids, written from the formulas -------------------------------------------------------------


def grid_points(fmt: Format, zero_point: torch.Tensor | None, blocks: tuple[int, int]):
    """Every value a block can hold at scale 1. Returns (R, G, number of codes) float64."""
    if fmt.kind == "integer":
        points = torch.arange(fmt.q_min, fmt.q_max + 1, dtype=torch.float64)
    elif fmt.kind == "codebook":
        points = torch.tensor(fmt.levels, dtype=torch.float64)
    else:
        points = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).double()
        points = points[points.isfinite()]
    points = points.expand(*blocks, -1)
    return points if zero_point is None else points - zero_point.double().unsqueeze(-1)


# --- checkers -------------------------------------------------------------------------------------


def assert_nearest(values, image, scale, zero_point, fmt: Format) -> None:
    """No point of the grid is nearer to a value than its image, up to rounding.

    values, image: (R, G, B) float32; scale, zero_point: (R, G).
    Slack: 4 u (|w| + |image| + s), see the top.
    """
    r, g, b = values.shape
    values, image, scale = values.double(), image.double(), scale.double().unsqueeze(-1)
    grid = scale * grid_points(fmt, zero_point, (r, g))
    nearest = (values.unsqueeze(-1) - grid.unsqueeze(-2)).abs().amin(-1)
    slack = 4 * UNIT_ROUNDOFF * (values.abs() + image.abs() + scale) + SUBNORMAL
    _assert_below((values - image).abs(), nearest + slack, "distance to the nearest grid point")


def assert_within_half_step(values, image, scale) -> None:
    """|w - image| <= scale / 2. values, image: (R, G, B) float32; scale: (R, G).

    Slack: 2 u |w| for the quotient and u |image| for the product. The zero point was rounded in
    float64, so the grid may end half a step inside the range: 2^-40 steps more than cover that.
    """
    values, image, scale = values.double(), image.double(), scale.double().unsqueeze(-1)
    slack = 2 * UNIT_ROUNDOFF * (values.abs() + image.abs()) + scale * 2.0**-40
    _assert_below((values - image).abs(), scale / 2 + slack, "half a step")


def assert_linear(y, x, weight: QTensor, bias=None) -> None:
    """y = x @ weight.T + bias, to the rounding of x's dtype. y: (..., N); x: (..., K).

    S = |x| @ |weight|.T, summed in float32 whatever x is: 2 K eps S (STYLE 19) + the bias added.
    A 16-bit x with roundoff v rounds the weight (v S), the product and the sum with the bias (v of
    their size each), and what underflows (one subnormal each).
    """
    real = _values(weight)
    wide = x.double()
    expected, size = wide @ real.T, wide.abs() @ real.abs().T
    if bias is not None:
        expected = expected + bias.double()
    limits = torch.finfo(x.dtype)
    eps = torch.finfo(torch.float32).eps
    bound = 2 * x.shape[-1] * eps * size + limits.eps * (expected.abs() + _magnitude(bias))
    if x.dtype != torch.float32:
        roundoff = limits.eps / 2
        bound = bound + roundoff * size + 3 * roundoff * (expected.abs() + _magnitude(bias))
        tiny = limits.smallest_normal * limits.eps
        bound = bound + tiny * (2 + wide.abs().sum(-1, keepdim=True))
    assert y.dtype == x.dtype, f"{y.dtype}, not {x.dtype}"
    _assert_below((y.double() - expected).abs(), bound, "rounding")


def assert_embedding(y, indices, weight: QTensor, dtype: torch.dtype) -> None:
    """y = weight[indices] to the rounding of float32 and of `dtype`. y: (..., K)."""
    expected = _values(weight)[indices]
    limits = torch.finfo(dtype)
    bound = (limits.eps / 2 + 2 * UNIT_ROUNDOFF) * expected.abs()
    bound = bound + limits.smallest_normal * limits.eps
    assert y.dtype == dtype, f"{y.dtype}, not {dtype}"
    _assert_below((y.double() - expected).abs(), bound, "rounding")


@lru_cache(maxsize=2)
def _values(weight: QTensor) -> torch.Tensor:
    """The oracle's weight, (N, K) float64; kept, because one weight is checked many times."""
    return weight_values(weight)


def _magnitude(bias) -> torch.Tensor | float:
    return 0.0 if bias is None else bias.double().abs()


def _assert_below(distance: torch.Tensor, bound: torch.Tensor, what: str) -> None:
    assert distance.shape == bound.shape, f"shape {tuple(distance.shape)}, not {tuple(bound.shape)}"
    wrong = ~(distance <= bound)  # NaN is wrong
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are further than {what}; the first at {at}: "
            f"{distance[at].item():.6g} > {bound[at].item():.6g}"
        )


def corruptions(y: torch.Tensor, y_scale_lost: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checker must reject. y: (rows, ...); y_scale_lost: y without one group's scale."""
    yield "output x 2", y * 2
    yield "sign flipped", -y
    yield "two rows swapped", y[[1, 0, *range(2, len(y))]]
    yield "one group's scale lost", y_scale_lost
