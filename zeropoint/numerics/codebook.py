"""Codebooks: real = scale * levels[code], with the least scale at which the levels span the block.

Sources: QLoRA (arXiv:2305.14314) section 3 for nf4; bitsandbytes for the code order of nf4 and fp4;
llama.cpp for iq4nl; OCP Microscaling Formats (MX) 1.0 for E2M1. Levels of a row: any4
(arXiv:2507.04610), here `kmeans`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.numerics.formats import Format


def codebook_codes(
    blocks: Tensor, scale: Tensor, fmt: Format, of_rows: Tensor | None = None
) -> Tensor:
    """The code of the level nearest to real / scale. blocks: (R, G, B) float; scale: (R, G);
    of_rows: (R, L) levels, ascending, where the format learns them; returns uint8.

    A value between two levels has the lower one; of two codes with one level (fp4 has two zeros)
    the first stands for values below or at it. Both as in bitsandbytes 0.50, bit for bit. Levels
    that are small floats round to even and keep the sign of a zero (`_float_codes`).
    """
    if fmt.levels is None:
        assert of_rows is not None
        return _row_codes(blocks, scale, of_rows.float())
    levels = torch.tensor(fmt.levels, dtype=torch.float32, device=blocks.device)
    if fmt.ties == "even":
        values = blocks.float() / scale.unsqueeze(-1).float()
        values.nan_to_num_(nan=0.0)  # 0 / 0: of zeros, where subnormal scales are flushed to 0
        return _float_codes(values, levels)
    levels, codes = levels.sort(stable=True)
    midpoints = (levels[1:] + levels[:-1]) / 2
    normalised = blocks.float() * (1.0 / scale.unsqueeze(-1).float())
    return codes.to(torch.uint8)[torch.bucketize(normalised.contiguous(), midpoints)]


def _row_codes(blocks: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Codes of levels that each row has for itself. levels: (R, L) float32; returns (R, G, B)."""
    midpoints = (levels[:, 1:] + levels[:, :-1]) / 2
    normalised = blocks.float() * (1.0 / scale.unsqueeze(-1).float())
    codes = torch.searchsorted(midpoints, normalised.flatten(1).contiguous(), out_int32=True)
    return codes.to(torch.uint8).view(blocks.shape)


def _float_codes(values: Tensor, levels: Tensor) -> Tensor:
    """Codes of small floats: magnitudes in ascending order, then the same with a sign.

    Round to nearest, ties to the even code; what is beyond the largest is the largest.
    values: any shape, float32; levels: (L,) float32. Returns uint8.
    """
    half = len(levels) // 2
    magnitudes = levels[:half]
    below = (magnitudes[1:] + magnitudes[:-1]) / 2  # at most this is the lower one ...
    below[1::2] = torch.nextafter(below[1::2], below.new_zeros(()))  # ... unless that is odd
    codes = torch.bucketize(values.abs().contiguous(), below, out_int32=True)
    return (codes + half * values.signbit()).to(torch.uint8)


def codebook_values(
    codes: Tensor, scale: Tensor, fmt: Format, of_rows: Tensor | None = None
) -> Tensor:
    """real = scale * levels[codes]. codes: (R, G, B) uint8; scale: (R, G); returns float32."""
    if fmt.levels is None:
        assert of_rows is not None
        reals = of_rows.float().gather(1, codes.flatten(1).long()).view(codes.shape)
        return reals.mul_(scale.unsqueeze(-1).float())
    levels = torch.tensor(fmt.levels, dtype=torch.float32, device=codes.device)
    return levels[codes.int()].mul_(scale.unsqueeze(-1).float())
