"""Which values share a scale: all of them, one output channel (axis 0), or a group along the input
dimension.

Every function here sees a tensor as a matrix of N rows (axis 0) and K columns (all other axes,
flattened)
and cuts it into blocks: (R, G, B) = rows of blocks, blocks per row, values per block.
Scales and zero points have shape (R, G): (1, 1) per tensor, (N, 1) per channel, (N, K //
group_size) per group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from zeropoint.errors import GroupSizeError, RecipeError

Granularity = Literal["tensor", "channel", "group"]
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", "group")


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """(N, K) of a shape: axis 0, and the product of the others. A vector is one row; a scalar is 1
    x 1.
    """
    if len(shape) <= 1:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def scale_shape(
    shape: Sequence[int], granularity: Granularity, group_size: int | None, width: int = 1
) -> tuple[int, int]:
    """(R, G): the shape of the scales of a tensor of this shape. Raises GroupSizeError.

    width: of the format, values that rows and groups must hold a multiple of.
    """
    n, k = rows_and_columns(shape)
    if k % width:
        raise GroupSizeError(
            f"K={k} is not a multiple of {width}, and the format's codes stand for {width} values "
            "together; use another format or exclude this module"
        )
    if granularity == "tensor":
        return 1, 1
    if granularity == "channel":
        return n, 1
    if not isinstance(group_size, int) or group_size < 1:
        raise GroupSizeError(
            f"group_size={group_size!r} is not a positive number; per group needs one"
        )
    if group_size % width:
        raise GroupSizeError(
            f"group_size={group_size} is not a multiple of {width}, and the format's codes stand "
            f"for {width} values together; use group_size={-(-group_size // width) * width}"
        )
    if k % group_size:
        sizes = range(min(group_size, k) // width * width, 1, -width)
        divisor = next((d for d in sizes if k % d == 0), None)
        smaller = f"group_size={divisor}, " if divisor else ""
        raise GroupSizeError(
            f"K={k} is not a multiple of group_size={group_size}; use {smaller}group_size=-1 (per "
            "channel) "
            "or exclude this module"
        )
    return n, k // group_size


def blocked(
    values: Tensor, granularity: Granularity, group_size: int | None, width: int = 1
) -> Tensor:
    """View or copy of `values` as (R, G, B) blocks that share a scale. Raises GroupSizeError."""
    if granularity not in GRANULARITIES:
        raise RecipeError(f"granularity={granularity!r} is not one of {', '.join(GRANULARITIES)}")
    rows, groups = scale_shape(values.shape, granularity, group_size, width)
    return values.reshape(rows, groups, values.numel() // max(1, rows * groups))
