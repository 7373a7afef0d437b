"""Scales of groups as NVFP4 has them: a float8_e4m3fn number each, times one float32 of the tensor.

    scale = unit * e4m3[i]        unit = max |r| / (448 * 6), so that the largest scale is 448 units

Whatever chooses codes sees values in units, whose scales are float8_e4m3fn and nothing else. Stored
as bytes, as `double_quant` is: the unit (float32), then a byte for each scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.errors import ScaleRangeError
from zeropoint.numerics.affine import round_scale

_FLOAT_BYTES = 4
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_ROUNDED_UP = 1 + 2.0**-4  # how much larger than a number the nearest e4m3 can be


def unit_of(values: Tensor, largest_element: float) -> Tensor:
    """The unit of a tensor, 1 for zeros. values: any shape, finite floats; returns () float32 > 0.

    Raises ScaleRangeError for values that could come back as Inf.
    """
    largest, limit = values.abs().max().double(), torch.finfo(values.dtype).max
    if largest * _ROUNDED_UP > limit:
        raise ScaleRangeError(
            f"values up to {largest.item():.6g} are too close to the largest {values.dtype} "
            f"({limit:.6g}) for scales of float8_e4m3fn; convert them to a wider dtype or exclude "
            "this module"
        )
    unit = (largest / (_LARGEST * largest_element)).float()
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(largest > 0, unit.clamp_min(tiny), 1.0)


def block_scale(blocks: Tensor, largest_element: float) -> Tensor:
    """The scale nearest to max |r| / largest element. blocks: (R, G, B) float, in units.

    Returns (R, G) float8_e4m3fn > 0. Raises ScaleRangeError for one beyond 448.
    """
    exact = blocks.abs().amax(dim=-1).double() / largest_element
    if (exact > _LARGEST * _ROUNDED_UP).any():
        raise ScaleRangeError(
            f"a scale of {exact.max().item():.6g} does not fit float8_e4m3fn, whose largest value "
            f"is {_LARGEST:.6g}; use double_quant=True, which gives the tensor a scale of its own"
        )
    return round_scale(exact.float(), torch.float8_e4m3fn)


def stored_bytes(count: int) -> int:
    """Bytes that `count` scales take.

    >>> stored_bytes(256)
    260
    """
    return _FLOAT_BYTES + count


def compress(scale: Tensor, unit: Tensor | None = None) -> Tensor:
    """Scales as stored bytes. scale: (R, G) float8_e4m3fn; unit: () float32, or None for 1.

    Returns (stored_bytes(R * G),) uint8. Nothing is rounded.
    """
    if unit is None:
        unit = torch.ones((), device=scale.device)
    stored = (unit.reshape(1), scale.contiguous().view(-1))
    return torch.cat([part.view(torch.uint8) for part in stored])


def extend(stored: Tensor, count: int, scale: Tensor) -> Tensor:
    """The stored bytes of `count` scales, and more scales after them, in the unit that they have.

    scale: (R, G) float32, > 0, cut off beyond 448 units; returns (stored_bytes(count + R * G),).
    """
    assert len(stored) == stored_bytes(count)
    in_units = scale.float().reshape(-1) / stored[:_FLOAT_BYTES].clone().view(torch.float32)
    return torch.cat([stored, round_scale(in_units, torch.float8_e4m3fn).view(torch.uint8)])


def expand(stored: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `compress`. stored: uint8; returns `shape` float32."""
    unit = stored[:_FLOAT_BYTES].clone().view(torch.float32)
    return (stored[_FLOAT_BYTES:].view(torch.float8_e4m3fn).float() * unit).view(shape)
