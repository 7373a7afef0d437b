"""Quantization of one tensor: from real values to codes and back, and what it cost.

Pure functions of tensors, usable alone:

>>> import torch
>>> weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
>>> q = quantize(weight, "int8", symmetric=False)
>>> q.codes, q.scale, q.zero_point
(tensor([[-128,  -43,   -1,  127]], dtype=torch.int8),
 tensor([[0.0118]]),
 tensor([[-43]], dtype=torch.int8))
>>> dequantize(*q, "int8")
tensor([[-1.0000,  0.0000,  0.4941,  2.0000]])
>>> quantization_error(weight, fake_quantize(weight, "int8", symmetric=False)).max
0.00588...
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zeropoint.errors import NonFiniteError, RecipeError, ScaleRangeError, UnknownNameError, nearest
from zeropoint.numerics import affine, e8p, kmeans, microscaling, tensor_scale
from zeropoint.numerics.formats import (
    FORMATS,
    LEVELS_DTYPE,
    SCALE_DTYPES,
    SMALL_SCALE_DTYPES,
    Format,
    get_format,
)
from zeropoint.numerics.granularity import Granularity, blocked, rows_and_columns, scale_shape
from zeropoint.numerics.grid import Grid, grid_codes, grid_values
from zeropoint.numerics.packing import pack, unpack
from zeropoint.numerics.two_level import CODINGS

__all__ = [
    "FORMATS",
    "LEVELS_DTYPE",
    "Format",
    "Grid",
    "QuantizationError",
    "Quantized",
    "blocked",
    "check_finite",
    "check_image",
    "check_range",
    "dequantize",
    "fake_quantize",
    "get_format",
    "get_scale_dtype",
    "grid_codes",
    "grid_values",
    "in_units",
    "levels_for",
    "pack",
    "quantization_error",
    "quantize",
    "rows_and_columns",
    "scale_shape",
    "unpack",
]


class Quantized(NamedTuple):
    """Codes with what is needed to read them.

    codes: the shape of the values; int8 (integer formats), uint8 (codebooks, vectors), float8 or
    float16/bfloat16.
    scale: (R, G) of the scale dtype, or None for a downcast. zero_point: (R, G) int8 or
    float16, or None where it is 0. levels: (R, 2^bits) float16, ascending, where the format learns
    them, else None. R and G are given in `numerics.granularity`.
    """

    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    levels: Tensor | None = None


class QuantizationError(NamedTuple):
    """Distance between values and their quantized image.

    max: largest absolute difference. mse: mean squared difference.
    sqnr_db: 10 log10(mean square of the values / mse), inf when nothing was lost.
    """

    max: float
    mse: float
    sqnr_db: float


def get_scale_dtype(name: str) -> torch.dtype:
    """The torch dtype of a scale dtype's name. Raises UnknownNameError."""
    known = SCALE_DTYPES | SMALL_SCALE_DTYPES
    if not isinstance(name, str) or name not in known:
        raise UnknownNameError(f"{name!r} is not a scale dtype; {nearest(str(name), known)}")
    return known[name]


def check_finite(values: Tensor) -> None:
    """Raises NonFiniteError when there is a NaN or Inf, saying how many and where the first is."""
    if values.numel() and not torch.isfinite(torch.stack(values.aminmax())).all():
        finite = torch.isfinite(values)
        nan = int(torch.isnan(values).sum())
        inf = int((~finite).sum()) - nan
        first = (~finite).nonzero()[0].tolist()
        raise NonFiniteError(
            f"{nan} NaN and {inf} Inf among {values.numel()} values, the first at {first}; "
            "repair the weight or exclude this module"
        )


def check_range(values: Tensor, format: str) -> None:
    """Raises ScaleRangeError when `format` has no scale and a value is beyond what it can hold."""
    fmt = get_format(format)
    if fmt.kind == "downcast":
        _downcast(values, fmt)


def quantize(
    values: Tensor,
    format: str = "int8",
    *,
    granularity: Granularity | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    float_zero_point: bool = False,
    scale_dtype: str = "float32",
) -> Quantized:
    """Codes nearest to the values on the format's grid: codes = clamp(round(real / scale +
    zero_point)).

    values: (N, K) or any shape, float, finite. granularity: "tensor", "channel" or "group"; by
    default "group" when there is a group_size (values along K that share a scale), else "channel".
    symmetric: zero_point is 0; False is for integer formats only. float_zero_point: it is float16,
    and 0 need not be on the grid; with symmetric=False. The grid spans each block's minimum and
    maximum; of vectors see `e8p`, of a scale_dtype of 8 bits `microscaling` and `tensor_scale`.
    Levels that the format learns are those of least squared error for these scales.
    Raises NonFiniteError, GroupSizeError, ScaleRangeError, UnknownNameError, RecipeError.
    """
    fmt = get_format(format)
    dtype = get_scale_dtype(scale_dtype)
    if not values.is_floating_point():
        raise RecipeError(f"values are {values.dtype}, not floats; there is nothing to quantize")
    if not symmetric and fmt.kind != "integer":
        raise RecipeError(f"symmetric=False: {format} has no zero point; leave symmetric out")
    if float_zero_point and symmetric:
        raise RecipeError("float_zero_point=True needs symmetric=False: there is no zero point")
    if granularity is None:
        granularity = "channel" if group_size is None else "group"
    elif granularity != "group" and group_size is not None:
        raise RecipeError(
            f"group_size={group_size} with granularity={granularity!r}; use granularity='group'"
        )
    check_finite(values)
    if fmt.kind == "downcast":
        return Quantized(_downcast(values, fmt), None, None)
    blocks = blocked(values, granularity, group_size, fmt.width)
    if values.numel() == 0:
        raise RecipeError(
            f"values of shape {tuple(values.shape)} are empty; there is nothing to quantize"
        )
    zero_point = None
    if dtype in _SPECIFIED:
        scale = _SPECIFIED[dtype](blocks, fmt.real_max)
    elif fmt.kind == "vector":
        scale = e8p.vector_scale(blocks, dtype)
    elif symmetric:
        # The scale of zeros in a codebook is next to nothing: 1.0 among the scales that
        # `double_quant` compresses together would cost all others their precision.
        of_zeros = 0.0 if fmt.kind == "codebook" else 1.0
        scale = affine.symmetric_scale(blocks, fmt.reach, dtype, of_zeros=of_zeros)
    else:
        parameters = (
            affine.float_zero_parameters if float_zero_point else affine.asymmetric_parameters
        )
        scale, zero_point = parameters(blocks, fmt, dtype)
    levels = levels_for(blocks, scale, fmt) if fmt.learns_levels else None
    grid = Grid(scale, zero_point, levels)
    quantized = Quantized(grid_codes(blocks, grid, fmt).view(values.shape), *grid)
    check_image(values, quantized, format)
    return quantized


_SPECIFIED: dict[torch.dtype, Callable[[Tensor, float], Tensor]] = {
    torch.float8_e8m0fnu: microscaling.shared_exponent,
    torch.float8_e4m3fn: tensor_scale.block_scale,
}
"""How scales of 8 bits are chosen: (blocks, largest element) -> scales."""


def levels_for(
    blocks: Tensor, scale: Tensor, fmt: Format, importance: Tensor | None = None
) -> Tensor:
    """The levels of least squared error for given scales, as they are stored.

    minimise, for each row:  sum importance (real - scale * levels[code])^2

    blocks: (R, G, B) float; scale: (R, G) > 0; importance: (1 or R, G, B) float > 0, or None for 1.
    Returns (R, 2^bits) float16, ascending.
    """
    scale = scale.unsqueeze(-1).float()
    weights = (
        scale / scale.amax(dim=1, keepdim=True)
    ).square()  # which underflow where one is tiny
    if importance is not None:
        weights = weights * importance
    values = (blocks.float() / scale).flatten(1)
    weights = weights.expand(blocks.shape).flatten(1)
    return kmeans.learned_levels(values, weights, 1 << fmt.bits).to(LEVELS_DTYPE)


def in_units(
    values: Tensor, format: str, scale_dtype: str, double_quant: bool
) -> tuple[Tensor, Tensor | None]:
    """Values as codes are chosen for them, and the float of the tensor they were divided by.

    As they are and None, but for scales that `numerics.tensor_scale` stores.
    values: any shape, float. Returns it in float32, and () float32. Raises NonFiniteError,
    ScaleRangeError.
    """
    if not double_quant or CODINGS[scale_dtype] is not tensor_scale:
        return values, None
    check_finite(values)
    unit = tensor_scale.unit_of(values, get_format(format).real_max)
    return values.float() / unit, unit


def check_image(values: Tensor, quantized: Quantized, format: str) -> None:
    """Refuse a grid whose points lie beyond the dtype of the values: they would come back as
    Inf.
    """
    limit = torch.finfo(values.dtype).max
    low, high = values.aminmax()
    if max(-low.item(), high.item()) < limit / 2:
        return  # the grid ends less than one step beyond the values
    image = dequantize(*quantized, format).to(values.dtype)
    if not torch.isfinite(image).all():
        raise ScaleRangeError(
            f"values up to {max(-low.item(), high.item()):.6g} are too close to the largest "
            f"{values.dtype} ({limit:.6g}) for a {format} grid; convert them to a wider dtype or "
            "exclude this module"
        )


def _downcast(values: Tensor, fmt: Format) -> Tensor:
    assert fmt.dtype is not None
    codes = values.to(fmt.dtype)
    if not torch.isfinite(codes).all():
        raise ScaleRangeError(
            f"{values.abs().max().item():.6g} does not fit {fmt.name}, whose largest value is "
            f"{fmt.real_max:.6g}; "
            + ("use bfloat16" if fmt.name == "float16" else "exclude this module")
        )
    return codes


def dequantize(
    codes: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None = None,
    levels: Tensor | None = None,
    format: str = "int8",
) -> Tensor:
    """real = scale * (codes - zero_point), or scale * levels[codes].
    Inverse of `quantize` up to rounding.

    codes: any shape; scale, zero_point, levels: as `quantize` returned them. Returns float32 of the
    codes' shape.
    """
    fmt = get_format(format)
    if fmt.kind == "downcast":
        return codes.float()
    if scale is None:
        raise RecipeError(f"scale is None, but {format} needs one: (1, 1), (N, 1) or (N, groups)")
    if fmt.learns_levels and levels is None:
        raise RecipeError(
            f"levels is None, but {format} needs them: those that `quantize` returned"
        )
    blocks = codes.reshape(*scale.shape, codes.numel() // max(1, scale.numel()))
    return grid_values(blocks, Grid(scale, zero_point, levels), fmt).view(codes.shape)


def fake_quantize(
    values: Tensor,
    format: str = "int8",
    *,
    granularity: Granularity | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    float_zero_point: bool = False,
    scale_dtype: str = "float32",
    double_quant: bool = False,
) -> Tensor:
    """dequantize(quantize(values)), in the dtype of the values.

    double_quant: with scales as `numerics.two_level` stores them. Other arguments and errors of
    `quantize`.
    """
    plain, unit = in_units(values, format, scale_dtype, double_quant)
    q = quantize(
        plain,
        format,
        granularity=granularity,
        group_size=group_size,
        symmetric=symmetric,
        float_zero_point=float_zero_point,
        scale_dtype=scale_dtype,
    )
    scale = q.scale
    if unit is not None:
        assert scale is not None
        scale = scale.float() * unit
    elif double_quant and scale is not None:
        rows, groups = scale.shape
        coding = CODINGS[scale_dtype]
        scale = coding.expand(coding.compress(scale), (rows, groups))
    return dequantize(q.codes, scale, q.zero_point, q.levels, format).to(values.dtype)


def quantization_error(values: Tensor, image: Tensor) -> QuantizationError:
    """How far `image` is from `values`. Both: same shape, float. Computed in float64.

    >>> quantization_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    QuantizationError(max=0.5, mse=0.125, sqnr_db=20.0)
    """
    if values.shape != image.shape:
        raise RecipeError(f"shapes differ: {tuple(values.shape)} and {tuple(image.shape)}")
    difference = values.double() - image.double()
    mse = difference.square().mean().item()
    power = values.double().square().mean().item()
    if mse == 0:
        sqnr_db = math.inf
    else:
        sqnr_db = 10 * math.log10(power / mse) if power else -math.inf
    return QuantizationError(difference.abs().max().item(), mse, sqnr_db)
