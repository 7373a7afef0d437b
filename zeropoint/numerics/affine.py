"""The affine grid: real = scale * (code - zero_point).

Sources: Jacob et al. 2018 (arXiv:1712.05877) eq. 1 for the map; the range is widened to contain 0,
so that 0 is exact and the zero point is a code. A float zero point (HQQ's; the "stored minimum" of
llama.cpp's Q4_1) needs no 0 in the range: the codes span the values alone. Scales are rounded *up*
to their stored dtype before any code is chosen, so no value of the range is clipped and |value -
dequantized| <= scale / 2 holds for the scale that is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.errors import ScaleRangeError
from zeropoint.numerics.formats import Format

# Below these, 1 / scale or scale itself is lost: float16 subnormals are normal numbers once in
# float32, where the arithmetic happens; the other two share float32's exponent, and its subnormals
# may be flushed to zero. A float8 scale is what its specification says it is.
SCALE_FLOOR = {
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-126,
    torch.float32: 2.0**-126,
    torch.float8_e8m0fnu: 2.0**-127,
    torch.float8_e4m3fn: 2.0**-9,
}
FURTHEST_ZERO = 2048.0  # codes from 0 that a float zero point may lie: float16 counts in ones there
_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def round_scale_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of `dtype` that is >= scale and >= the dtype's floor. scale: any shape,
    float64, >= 0.

    Raises ScaleRangeError when a scale is larger than the dtype can hold.
    """
    scale = scale.double().clamp_min(SCALE_FLOOR[dtype])
    stored = scale.to(dtype)
    next_up = (stored.view(_BITS[dtype]) + 1).view(dtype)  # positive floats order as their bits
    stored = torch.where(stored.double() < scale, next_up, stored)
    if not torch.isfinite(stored).all():
        name = str(dtype).removeprefix("torch.")
        raise ScaleRangeError(
            f"a scale of {scale.max().item():.6g} does not fit {name}, whose largest value is "
            f"{torch.finfo(dtype).max:.6g}; "
            + ("exclude this module" if name == "float32" else "use scale_dtype='float32'")
        )
    return stored


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of its sign that `dtype` can hold and divide by. scale: (...) float."""
    size = scale.abs().clamp(SCALE_FLOOR[dtype], torch.finfo(dtype).max)
    return size.copysign(scale).to(dtype)


def round_zero_point(zero_point: Tensor) -> Tensor:
    """A float zero point as it is stored, float16. zero_point: any shape, float, in code units."""
    return zero_point.clamp(-FURTHEST_ZERO, FURTHEST_ZERO).to(torch.float16)


def symmetric_scale(
    blocks: Tensor,
    reach: tuple[float, float],
    scale_dtype: torch.dtype,
    *,
    of_zeros: float = 1.0,
) -> Tensor:
    """scale = max(-min r / below, max r / above), (below, above) being the grid's reach.

    blocks: (R, G, B) float; returns (R, G) of scale_dtype, > 0. of_zeros: the scale of a block of
    zeros, rounded up like any other.

    A block whose non-zero values all have one magnitude gets that magnitude as its scale when the
    grid has a 1 and a -1, which makes it exact.
    """
    below, above = reach
    magnitude = blocks.abs()
    largest = magnitude.amax(dim=-1)
    scale = torch.maximum(-blocks.amin(-1).double() / below, blocks.amax(-1).double() / above)
    if min(reach) >= 1:
        one_magnitude = ((magnitude == largest.unsqueeze(-1)) | (magnitude == 0)).all(dim=-1)
        fits = one_magnitude & (largest.double() <= torch.finfo(scale_dtype).max)
        scale = torch.where(fits, largest.double(), scale)
    return round_scale_up(torch.where(largest > 0, scale, of_zeros), scale_dtype)


def affine_parameters(
    r_min: Tensor, r_max: Tensor, fmt: Format, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """scale = (r_max - r_min) / (q_max - q_min); zero_point = round(q_min - r_min / scale).

    r_min, r_max: same shape, float, r_min <= r_max. The range is widened to contain 0 first, which
    is what keeps the zero point inside [q_min, q_max]. Returns scale (scale_dtype, > 0) and
    zero_point (int8).
    """
    r_min = r_min.double().clamp_max(0.0)
    r_max = r_max.double().clamp_min(0.0)
    spread = r_max - r_min
    exact = torch.where(spread > 0, spread / (fmt.q_max - fmt.q_min), 1.0)
    scale = round_scale_up(exact, scale_dtype)
    zero_point = torch.round(fmt.q_min - r_min / scale.double())
    assert ((zero_point >= fmt.q_min) & (zero_point <= fmt.q_max)).all(), "0 is inside the range"
    return scale, zero_point.to(torch.int8)


def asymmetric_parameters(
    blocks: Tensor, fmt: Format, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`affine_parameters` of each block's range. blocks: (R, G, B) float; returns two of shape (R,
    G).

    A constant block c is stored exactly (up to the scale's dtype) with scale |c| and codes one step
    from zero.
    """
    r_min, r_max = blocks.amin(dim=-1), blocks.amax(dim=-1)
    scale, zero_point = affine_parameters(r_min, r_max, fmt, scale_dtype)
    return _exact_where_constant(r_min, r_max, scale, zero_point)


def _exact_where_constant(
    r_min: Tensor, r_max: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    constant = (r_min == r_max) & (r_max != 0) & (r_max.abs() <= torch.finfo(scale.dtype).max)
    if constant.any():
        exact = round_scale_up(torch.where(constant, r_max.abs().double(), 1.0), scale.dtype)
        scale = torch.where(constant, exact, scale)
        zero_point = torch.where(constant, torch.zeros_like(zero_point), zero_point)
    return scale, zero_point


def float_zero_parameters(
    blocks: Tensor, fmt: Format, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """scale = (r_max - r_min) / (q_max - q_min); zero_point = q_min - r_min / scale, not rounded to
    a code, and the range not widened to contain 0.

    blocks: (R, G, B) float; returns two of shape (R, G): scale (scale_dtype, > 0), zero_point
    (float16). A range far from 0 gets a scale that keeps the zero point within `FURTHEST_ZERO`,
    where rounding it to float16 moves the grid by half a step at most: so does every value's error
    stay below half a step. Constant blocks as in `asymmetric_parameters`.
    """
    r_min, r_max = blocks.amin(dim=-1), blocks.amax(dim=-1)
    low, high = r_min.double(), r_max.double()
    furthest = 2 * torch.maximum(-low, high) / FURTHEST_ZERO  # the half is left for q_min
    exact = torch.maximum((high - low) / (fmt.q_max - fmt.q_min), furthest)
    scale = round_scale_up(torch.where(exact > 0, exact, 1.0), scale_dtype)
    zero_point = round_zero_point(fmt.q_min - low / scale.double())
    return _exact_where_constant(r_min, r_max, scale, zero_point)


def steps_to_codes(steps: Tensor, zero_point: Tensor | None) -> Tensor:
    """round(steps) + zero_point, not clamped; a zero point with a fraction is added first.

    steps: (R, G, B) float, real / scale; zero_point: (R, G) int8, or float, or None.
    """
    if zero_point is None:
        return torch.round(steps)
    if zero_point.is_floating_point():
        return torch.round(steps + zero_point.unsqueeze(-1).to(steps.dtype))
    return torch.round(steps) + zero_point.unsqueeze(-1)


def affine_codes(blocks: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format) -> Tensor:
    """codes = clamp(round(real / scale + zero_point), q_min, q_max), ties to even.

    blocks: (R, G, B) float; scale, zero_point: (R, G). Returns (R, G, B) int8.
    """
    wide = torch.promote_types(blocks.dtype, torch.float32)
    codes = steps_to_codes(blocks.to(wide) / scale.unsqueeze(-1).to(wide), zero_point)
    return codes.clamp_(fmt.q_min, fmt.q_max).to(torch.int8)


def affine_values(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """real = scale * (codes - zero_point). codes: (R, G, B); scale, zero_point: (R, G); returns
    float32.
    """
    real = codes.to(torch.float32)
    if zero_point is not None:
        real -= zero_point.unsqueeze(-1)
    return real.mul_(scale.unsqueeze(-1).float())
