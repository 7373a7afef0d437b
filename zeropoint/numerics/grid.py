"""A grid whose scale and zero point are given: codes nearest to values, and values of codes.

One function each for every format that has scales; `quantize` chooses the grid first, the searching
algorithms try many.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from zeropoint.numerics import affine, codebook
from zeropoint.numerics.formats import Format


class Grid(NamedTuple):
    """scale: (R, G) of the stored dtype, > 0, or also < 0 where the format has a `signed_scale` and
    there is no zero point. zero_point: (R, G) int8, float16 or None.
    """

    scale: Tensor
    zero_point: Tensor | None


def grid_codes(blocks: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format) -> Tensor:
    """The code of the grid point nearest to each value. codes = clamp(round(real / scale) + z).

    blocks: (R, G, B) float; scale: (R, G) > 0; zero_point: (R, G) or None. Returns (R, G, B) int8
    (integer formats), uint8 (codebooks) or float8.
    """
    if fmt.kind == "integer":
        return affine.affine_codes(blocks, scale, zero_point, fmt)
    if fmt.kind == "codebook":
        return codebook.codebook_codes(blocks, scale, fmt)
    assert fmt.dtype is not None
    normalised = blocks.float() / scale.unsqueeze(-1).float()
    normalised.nan_to_num_(nan=0.0)  # 0 / 0: of zeros, where subnormal scales are flushed to 0
    return normalised.clamp_(-fmt.real_max, fmt.real_max).to(fmt.dtype)


def grid_values(codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format) -> Tensor:
    """real = scale * (code - zero_point), or scale * levels[code]. Inverse of `grid_codes` on the
    grid.

    codes: (R, G, B) as `grid_codes` returns them. Returns (R, G, B) float32.
    """
    if fmt.kind == "codebook":
        return codebook.codebook_values(codes, scale, fmt)
    return affine.affine_values(codes, scale, zero_point)
