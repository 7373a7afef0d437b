"""Scale search: the grid with the least weighted error, not the one that spans the range.

minimise over (s, z):  sum_k importance_k (w_k - s (q_k - z))^2

Ranges are shrunk step by step; for each, the codes are fixed and (s, z) refitted by weighted least
squares, rounded to the stored dtype, and the codes chosen again (k-quants' make_qkx3, llama.cpp,
whose stored minimum is -s z with a float z).
The grid that spans the range is always a candidate, so the result is never worse than rounding in
this norm. Symmetric grids of few codes are tried with both signs of s: they have one code more on
one side of 0 (llama.cpp's Q4_0). Levels that are learned are refitted in turn with the scales: the
best levels of a row for its scales and codes are weighted means, so no step makes it worse.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zeropoint.algorithms.choice import Choice, Moments
from zeropoint.algorithms.rtn import rtn
from zeropoint.numerics import (
    Format,
    Grid,
    Quantized,
    blocked,
    check_image,
    get_scale_dtype,
    grid_codes,
    grid_values,
    levels_for,
)
from zeropoint.numerics.affine import round_scale, round_zero_point
from zeropoint.qtensor import QTensor, weight_in_units
from zeropoint.scheme import Scheme

LARGE_ELEMENTS = (
    1 << 25
)  # of weights that are taken some rows at a time, where rows are of their own
CHUNK_ELEMENTS = 1 << 18  # a megabyte of float32: the search's temporaries stay in the cache
REFITS = 2
FLOAT_REFITS = 8  # of a float zero point, which takes longer to settle
LEVEL_REFITS = 4  # of levels and scales in turn
# By bits: the smallest share of the range worth trying, and how many are tried. The best clip of a
# Gaussian is at 1.5, 2.0, 2.5, 2.9, 3.3 and 3.9 sigma for 2, 3, 4, 5, 6 and 8 bits; the range of 32
# to 1024 values is 2.1 to 3.4 sigma on either side.
SHARES = {
    2: (0.4, 14),
    3: (0.5, 12),
    4: (0.6, 10),
    5: (0.7, 8),
    6: (0.8, 6),
    7: (0.85, 4),
    8: (0.85, 4),
}


def search(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> QTensor:
    """Codes on the grid of least weighted squared error. weight: (N, K) float.

    importance: (K,) float >= 0, as E[x^2] of the inputs; None counts all columns alike.
    Raises NonFiniteError, GroupSizeError, ScaleRangeError.
    """
    rows_at_once = max(1, LARGE_ELEMENTS // weight.shape[-1])
    if weight.numel() > LARGE_ELEMENTS and weight.dim() == 2 and scheme.of_some_rows == scheme:
        return QTensor.concatenate(
            [search(part, scheme, importance) for part in weight.split(rows_at_once)]
        )
    fmt, plain = scheme.fmt, replace(scheme, double_quant=False)
    values, unit = weight_in_units(weight, scheme)
    start = rtn(values, plain)
    if fmt.kind == "downcast":
        return start
    grid = search_grid(values, plain, importance, start=start)
    blocks = blocked(values, scheme.granularity, scheme.group_size)
    quantized = Quantized(grid_codes(blocks, grid, fmt).view(weight.shape), *grid)
    check_image(values, quantized, scheme.format)
    return QTensor.from_codes(quantized, plain, weight.dtype).with_scheme(scheme, unit)


def choose(weight: Tensor, moments: Moments | None, scheme: Scheme) -> Choice:
    """`search` as a row of the table; the data-free algorithm `mse`."""
    return Choice(weight=search(weight, scheme), algorithm="mse")


def search_grid(
    weight: Tensor, scheme: Scheme, importance: Tensor | None = None, *, start: QTensor
) -> Grid:
    """The best grid of every block. weight: (N, K) float; start: the weight rounded to nearest.

    importance: (K,) or None. Returns scales of the scheme's dtype and zero points, as stored.
    """
    fmt, dtype = scheme.fmt, get_scale_dtype(scheme.scale_dtype)
    find = _search_levels if fmt.learns_levels else _search_rows
    blocks = blocked(weight, scheme.granularity, scheme.group_size)
    _, groups, width = blocks.shape
    if importance is None or not bool((importance > 0).any()):
        weights = torch.ones(1, 1, 1, device=weight.device)
    else:
        k = weight.shape[-1]
        floor = importance.float().mean() * 1e-6  # a column never seen still has to be stored
        weights = importance.float().clamp_min(floor)
        rows = weight.numel() // k if scheme.granularity == "tensor" else 1
        weights = weights.expand(rows, k).reshape(1, groups, width)
    rows_at_once = max(1, CHUNK_ELEMENTS // (groups * width))
    parts = []
    for at in range(0, len(blocks), rows_at_once):
        chunk = slice(at, at + rows_at_once)
        first = start.grid.rows(chunk)
        parts.append(find(blocks[chunk].float(), weights, first, fmt, dtype))
    return Grid.joined(parts)


def _search_rows(
    blocks: Tensor, weights: Tensor, start: Grid, fmt: Format, dtype: torch.dtype
) -> Grid:
    best, best_error = start, _error(blocks, weights, start, fmt)
    for share in _shares(fmt, dtype):
        for shrunk in _shrunk(start, share, fmt, dtype):
            tried = _refit(blocks, weights, shrunk, fmt, dtype)
            best, best_error = _better(blocks, weights, best, best_error, tried, fmt)
    for _ in range(FLOAT_REFITS if _has_float_zero(start) else REFITS):
        tried = _refit(blocks, weights, best, fmt, dtype)
        best, best_error = _better(blocks, weights, best, best_error, tried, fmt)
    return best


def _search_levels(
    blocks: Tensor, weights: Tensor, start: Grid, fmt: Format, dtype: torch.dtype
) -> Grid:
    """Scales and levels in turn, each the best for the other and the codes."""

    def error(grid: Grid) -> Tensor:  # of each row
        return _error(blocks, weights, grid, fmt).sum(1, keepdim=True)

    best, least = start, error(start)
    tried = start._replace(levels=levels_for(blocks, start.scale, fmt, weights))
    for _ in range(LEVEL_REFITS + 1):
        found = error(tried)
        best, least = best.where(found < least, tried), torch.minimum(found, least)
        tried = _refit(blocks, weights, tried, fmt, dtype)
        tried = tried._replace(levels=_means(blocks, weights, tried, fmt))
    return best


def _means(blocks: Tensor, weights: Tensor, grid: Grid, fmt: Format) -> Tensor:
    """The levels of least weighted squared error for the codes that `grid` gives. (R, L).

    level_l = sum k s w / sum k s^2 over the values of code l; one without values stays.
    """
    old = grid.levels
    assert old is not None
    codes = grid_codes(blocks, grid, fmt).flatten(1).long()
    scaled = (weights * grid.scale.unsqueeze(-1).float()).expand_as(blocks)

    def sums(part: Tensor) -> Tensor:
        zeros = torch.zeros(old.shape, dtype=torch.float64, device=blocks.device)
        return zeros.scatter_add_(1, codes, part.flatten(1).double())

    sll, slw = sums(scaled * grid.scale.unsqueeze(-1).float()), sums(scaled * blocks)
    return torch.where(sll > 0, slw / sll, old.double()).to(old.dtype)


def _shares(fmt: Format, dtype: torch.dtype) -> list[float]:
    if dtype == torch.float8_e8m0fnu:
        return [0.5, 2.0]  # the neighbours of a power of two; the specified one may cut values off
    if fmt.ties == "even":  # the last step of a small float is wide: a block's end may lie below it
        return [0.7 + 0.1 * step for step in range(10)]
    if fmt.kind == "vector":  # of what is best for a Gaussian whose values count alike
        return [0.7, 0.85, 1.0, 1.2, 1.4]
    smallest, steps = SHARES[fmt.bits]
    return [1.0 - (1.0 - smallest) * step / (steps - 1) for step in range(steps)]


def _has_float_zero(grid: Grid) -> bool:
    return grid.zero_point is not None and grid.zero_point.is_floating_point()


def _shrunk(grid: Grid, share: float, fmt: Format, dtype: torch.dtype) -> list[Grid]:
    """Grids of a share of the range: that around 0, with either sign where a sign makes a
    difference; with a float zero point, which has no such middle, those that keep the lower end,
    the middle or the upper end where they are.
    """
    scale = round_scale(grid.scale.float() * share, dtype)
    if grid.zero_point is None:
        return [Grid(s, None) for s in ((scale, -scale) if fmt.signed_scale else (scale,))]
    if not _has_float_zero(grid):
        return [Grid(scale, grid.zero_point)]
    wider = grid.scale.float() / scale.float()
    kept = (fmt.q_min, (fmt.q_min + fmt.q_max) / 2, fmt.q_max)  # s (code - z) stays what it is
    zero_points = [code - (code - grid.zero_point.float()) * wider for code in kept]
    return [Grid(scale, round_zero_point(z)) for z in zero_points]


def _error(blocks: Tensor, weights: Tensor, grid: Grid, fmt: Format) -> Tensor:
    image = grid_values(grid_codes(blocks, grid, fmt), grid, fmt)
    return (image.sub_(blocks).square_() * weights).sum(-1)


def _better(
    blocks: Tensor, weights: Tensor, best: Grid, best_error: Tensor, tried: Grid, fmt: Format
) -> tuple[Grid, Tensor]:
    error = _error(blocks, weights, tried, fmt)
    return best.where(error < best_error, tried), torch.minimum(error, best_error)


def _refit(blocks: Tensor, weights: Tensor, grid: Grid, fmt: Format, dtype: torch.dtype) -> Grid:
    """(s, z) of least weighted squared error for the codes that `grid` gives.

    Levels l = code (integer), levels[code] (codebook), code (float8). Without a zero point
    s = sum k w l / sum k l^2; with one, w = s l + m is fitted first: z = round(-m / s), then s; or
    s, then z = mean l - mean w / s where it is a float.
    """
    one = torch.ones_like(grid.scale, dtype=torch.float32)
    levels = grid_values(grid_codes(blocks, grid, fmt), Grid(one, None, grid.levels), fmt)
    weighted = levels * weights
    sll = (weighted * levels).sum(-1)
    swl = (weighted * blocks).sum(-1)
    zero_point = grid.zero_point
    if zero_point is not None:
        sk = weights.expand_as(blocks).sum(-1)
        sl, sw = weighted.sum(-1), (blocks * weights).sum(-1)
        determinant = sk * sll - sl * sl
        solvable = determinant > 1e-6 * sk * sll
        safe = torch.where(solvable, determinant, 1.0)
        slope = (sk * swl - sl * sw) / safe
        offset = (sll * sw - sl * swl) / safe
        usable = solvable & (slope > 0)
        if zero_point.is_floating_point():
            scale = round_scale(torch.where(usable, slope, grid.scale.float()), dtype)
            z = round_zero_point((sl - sw / scale.float()) / sk)  # the best for the stored scale
            return Grid(scale, torch.where(usable, z, zero_point))
        z = torch.round(-offset / torch.where(usable, slope, 1.0)).clamp(fmt.q_min, fmt.q_max)
        z = torch.where(usable, z, zero_point.float())
        sll, swl = sll - 2 * z * sl + z * z * sk, swl - z * sw
        zero_point = z.to(torch.int8)
    scale = swl / torch.where(sll > 0, sll, 1.0)
    same_sign = scale.sign() == grid.scale.float().sign()
    scale = torch.where((sll > 0) & same_sign, scale, grid.scale.float())
    return Grid(round_scale(scale, dtype), zero_point, grid.levels)
