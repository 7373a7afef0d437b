"""Scales of OCP Microscaling Formats (MX) 1.0: a power of two for every 32 values, in a byte.

    scale = 2^(floor(log2 max |r|) - e_max)        2^e_max: the largest power of two of the elements

Section 6.3 of the specification. max |r| / scale lies in [2^e_max, 2^(e_max + 1)), which is beyond
the largest element where that is less: E2M1 ends at 6 = 1.5 * 2^2, E4M3 at 448 = 1.75 * 2^8. Such
values are cut off there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shared_exponent(blocks: Tensor, largest_element: float) -> Tensor:
    """The scale of every block. blocks: (R, G, B) float; returns (R, G) float8_e8m0fnu.

    Exponents beyond those of the dtype, -127 to 127, are its nearest; that of zeros is -127.

    >>> shared_exponent(torch.tensor([[[0.3, -7.0]], [[0.0, 0.0]]]), 6.0).view(torch.uint8)
    tensor([[127],
            [  0]], dtype=torch.uint8)
    """
    largest = blocks.abs().amax(dim=-1).double()
    _, exponent = torch.frexp(largest)  # of a mantissa in [0.5, 1)
    _, e_max = math.frexp(largest_element)
    exponent = torch.where(largest > 0, exponent - e_max, -127).clamp(-127, 127)
    return torch.ldexp(torch.ones_like(largest), exponent).to(torch.float8_e8m0fnu)
