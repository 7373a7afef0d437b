"""A grid that is given: codes nearest to values, and values of codes.

One function each for every format that has scales; `quantize` chooses the grid first, the searching
algorithms try many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zeropoint.numerics import affine, codebook, e8p
from zeropoint.numerics.formats import Format


class Grid(NamedTuple):
    """scale: (R, G) of the stored dtype, > 0, or also < 0 where the format has a `signed_scale` and
    there is no zero point. zero_point: (R, G) int8, float16 or None. levels: (R, 2^bits) float16,
    ascending, where the format learns them; else None.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    levels: Tensor | None = None

    def rows(self, which: slice | Tensor) -> Grid:
        """The grid of some of its rows."""
        zero_point, levels = (part if part is None else part[which] for part in self[1:])
        return Grid(self.scale[which], zero_point, levels)

    @staticmethod
    def joined(grids: Sequence[Grid]) -> Grid:
        """The rows of several grids, one after the other."""
        columns = ([p for p in column if p is not None] for column in zip(*grids, strict=True))
        scale, zero_point, levels = (torch.cat(column) if column else None for column in columns)
        assert scale is not None
        return Grid(scale, zero_point, levels)

    def where(self, wins: Tensor, other: Grid) -> Grid:
        """The other grid's parts where it wins. wins: (R, G) bool; (R, 1) where there are levels,
        which go with all of the row.
        """
        zero_point, levels = (
            mine if mine is None or its is None else torch.where(wins, its, mine)
            for mine, its in zip(self[1:], other[1:], strict=True)
        )
        return Grid(torch.where(wins, other.scale, self.scale), zero_point, levels)


def grid_codes(blocks: Tensor, grid: Grid, fmt: Format) -> Tensor:
    """The code of the grid point nearest to each value. codes = clamp(round(real / scale) + z).

    blocks: (R, G, B) float. Returns (R, G, B) int8 (integer formats), uint8 (codebooks, vectors) or
    float8.
    """
    if fmt.kind == "integer":
        return affine.affine_codes(blocks, grid.scale, grid.zero_point, fmt)
    if fmt.kind == "codebook":
        return codebook.codebook_codes(blocks, grid.scale, fmt, grid.levels)
    if fmt.kind == "vector":
        return e8p.vector_codes(blocks, grid.scale)
    assert fmt.dtype is not None
    normalised = blocks.float() / grid.scale.unsqueeze(-1).float()
    normalised.nan_to_num_(nan=0.0)  # 0 / 0: of zeros, where subnormal scales are flushed to 0
    return normalised.clamp_(-fmt.real_max, fmt.real_max).to(fmt.dtype)


def grid_values(codes: Tensor, grid: Grid, fmt: Format) -> Tensor:
    """real = scale * (code - zero_point), or scale * levels[code]. Inverse of `grid_codes` on the
    grid.

    codes: (R, G, B) as `grid_codes` returns them. Returns (R, G, B) float32.
    """
    if fmt.kind == "codebook":
        return codebook.codebook_values(codes, grid.scale, fmt, grid.levels)
    if fmt.kind == "vector":
        return e8p.vector_values(codes, grid.scale)
    return affine.affine_values(codes, grid.scale, grid.zero_point)
