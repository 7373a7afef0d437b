"""A grid that is learned with the weights: LSQ (arXiv:1902.08153), and LSQ+ (arXiv:2004.09576) for
the zero point.

    image = s * (clamp(round(w / s) + z, q_min, q_max) - z)        or  s * levels[nearest(w / s)]

with s rounded to the dtype it is stored in and z to a code, or to float16, so that the image is
what a frozen weight stands for. Both roundings, and that of w / s, pass the gradient straight
through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zeropoint.numerics.affine import round_scale, round_zero_point, steps_to_codes
from zeropoint.numerics.formats import Format
from zeropoint.numerics.grid import Grid, grid_codes, grid_values


def stored_grid(
    scale: Tensor,
    zero_point: Tensor | None,
    fmt: Format,
    dtype: torch.dtype,
    *,
    float_zero_point: bool = False,
) -> Grid:
    """The grid as a checkpoint stores it. scale: (R, G) float; zero_point: (R, G) float or None."""
    if not (fmt.signed_scale and zero_point is None):
        scale = scale.clamp_min(0.0)
    if zero_point is not None and float_zero_point:
        zero_point = round_zero_point(zero_point)
    elif zero_point is not None:
        zero_point = torch.round(zero_point).clamp(fmt.q_min, fmt.q_max).to(torch.int8)
    return Grid(round_scale(scale, dtype), zero_point)


def on_grid(blocks: Tensor, grid: Grid, fmt: Format) -> Tensor:
    """Every value's grid point. blocks: (R, G, B) float; returns the same shape in float32."""
    return grid_values(grid_codes(blocks, grid, fmt), grid, fmt)


def grid_gradients(
    gradient: Tensor, blocks: Tensor, grid: Grid, fmt: Format
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of a loss with respect to values, scales and zero points.

    gradient: dL/dimage, blocks: w, both (R, G, B) float. With g = 1 / sqrt(B * q_max), and a value
    inside when its code was not clamped:

        dL/dw = dL/dimage                      inside,  0 outside
        dL/ds = g sum dL/dimage (image / s - w / s)  inside,  g sum dL/dimage (image / s) outside
        dL/dz = 0                              inside,  -g sum dL/dimage s outside

    Eq. 3 and section 2.2 of arXiv:1902.08153; eq. 5 of arXiv:2004.09576. B counts the values that
    share a scale. Returns (R, G, B), (R, G), and (R, G) or None.
    """
    gradient = gradient.float()
    scale = grid.scale.float().unsqueeze(-1)
    steps = blocks.float() / scale
    if fmt.kind == "integer":
        code = steps_to_codes(steps, grid.zero_point)
        inside = (code >= fmt.q_min) & (code <= fmt.q_max)
    else:
        below, above = fmt.reach
        inside = (steps >= -below) & (steps <= above)
    to_values = torch.where(inside, gradient, 0.0)
    share = 1.0 / math.sqrt(blocks.shape[-1] * fmt.real_max)
    levels = on_grid(blocks, grid, fmt) / scale
    to_scale = share * (gradient * (levels - torch.where(inside, steps, 0.0))).sum(-1)
    if grid.zero_point is None:
        return to_values, to_scale, None
    to_zero = -share * grid.scale.float() * (gradient - to_values).sum(-1)
    return to_values, to_scale, to_zero
