"""HQQ (Badri and Shaji 2023): half-quadratic optimisation of the zero point, without data.

minimise over z:  sum_k |w_k / s - (q_k - z)|^p,  q = clamp(round(w / s + z)),  p = 0.7

which counts outliers less than squares do. The residual r is split into a sparse part e and a rest
of least squares, in turn, while beta grows:

    e = sign(r) max(0, |r| - |r|^(p - 1) / beta)        z = mean(q - w / s + e)

The scale stays the one that spans the range. Counting in steps s, where the published code counts
in the weight's own unit, gives a weight times a power of two the same codes. Every block keeps the
best zero point it had, as it is stored: a float, or a code, which gives back most of the gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.algorithms.choice import Choice, Moments
from zeropoint.algorithms.rtn import rtn
from zeropoint.numerics import Grid, Quantized, blocked, check_image, grid_codes
from zeropoint.numerics.learned import stored_grid
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

NORM = 0.7  # p
BETA, GROWTH, ROUNDS = 10.0, 1.01, 20  # of the published code


def hqq(weight: Tensor, scheme: Scheme) -> QTensor:
    """Codes on the grid that spans the range, its zero points moved. weight: (N, K) float.

    A scheme without zero points is rounded to nearest: there is nothing to move.
    Raises NonFiniteError, GroupSizeError, ScaleRangeError.
    """
    start = rtn(weight, scheme)
    if start.zero_point is None:
        return start
    assert start.scale is not None
    fmt, scale, zero_point = scheme.fmt, start.scale, start.zero_point
    blocks = blocked(weight.detach(), scheme.granularity, scheme.group_size)
    steps = blocks.float() / scale.float().unsqueeze(-1)
    best, least = zero_point, torch.full(scale.shape, torch.inf, device=scale.device)
    beta = BETA
    for _ in range(ROUNDS):
        codes = grid_codes(blocks, Grid(scale, zero_point), fmt).float()
        residual = steps - (codes - zero_point.float().unsqueeze(-1))
        size = residual.abs()
        loss = size.pow(NORM).sum(-1)
        best = torch.where(loss < least, zero_point, best)
        least = torch.minimum(loss, least)
        sparse = residual.sign() * (size - size.pow(NORM - 1) / beta).clamp_min(0)
        moved = (codes - steps + sparse).mean(-1)
        zero_point = _stored(scale, moved, scheme)
        beta *= GROWTH
    grid = Grid(scale, best)
    quantized = Quantized(grid_codes(blocks, grid, fmt).view(weight.shape), *grid)
    check_image(weight, quantized, scheme.format)
    return QTensor.from_codes(quantized, scheme, weight.dtype)


def _stored(scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Zero points as a checkpoint stores them. scale, zero_point: (R, G)."""
    floats = scheme.float_zero_point
    grid = stored_grid(scale, zero_point, scheme.fmt, scale.dtype, float_zero_point=floats)
    assert grid.zero_point is not None
    return grid.zero_point


def choose(weight: Tensor, moments: Moments | None, scheme: Scheme) -> Choice:
    """`hqq` as a row of the table."""
    found = hqq(weight, scheme)
    if found.zero_point is not None:
        return Choice(weight=found, algorithm="hqq")
    reason = f"{scheme} has no zero point, and hqq moves nothing else"
    return Choice(weight=found, algorithm="rtn", reason=reason)
