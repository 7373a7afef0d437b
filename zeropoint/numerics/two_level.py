"""Scales of groups that are 8-bit numbers, with floats of a second level: stored as bytes.

A scheme's `double_quant` says that they are, its `scale_dtype` which of the two ways it is.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from zeropoint.numerics import double_quant, tensor_scale


class Coding(Protocol):
    """A module that stores scales. count: of scales; scale: (R, G); stored: (bytes,) uint8."""

    def stored_bytes(self, count: int) -> int: ...

    def compress(self, scale: Tensor) -> Tensor: ...

    def extend(self, stored: Tensor, count: int, scale: Tensor) -> Tensor: ...

    def expand(self, stored: Tensor, shape: tuple[int, int]) -> Tensor: ...


CODINGS: dict[str, Coding] = {"float32": double_quant, "float8_e4m3fn": tensor_scale}
