"""Scales of groups in 8 bits: the double quantization of QLoRA (arXiv:2305.14314, section 3).

    scale = offset + absmax[i // 256] * levels[code[i]]

offset is the mean of all scales, absmax the largest distance from it among 256 scales. Stored as
bytes, so that no cast of a model's floats changes them:

    offset (float32), then for every 256 scales: absmax (float32), their codes (a byte each)

Codes are those of bitsandbytes 0.50 on a CPU, bit for bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256  # scales that share an absmax
_FLOAT_BYTES = 4
_EXPONENTS = 7
_STEPS = 65535  # bitsandbytes rounds to a lattice of 2^16 points first, then to the nearest level


def stored_bytes(count: int) -> int:
    """Bytes that `count` scales take.

    >>> stored_bytes(256), stored_bytes(257)
    (264, 269)
    """
    return _FLOAT_BYTES * (1 + -(-count // BLOCK)) + count


@lru_cache
def levels() -> Tensor:
    """The 256 levels of dynamic-exponent quantization (arXiv:1511.04561), ascending, float32.

    0 and 1, and for each exponent e = -6 .. 0, with either sign, 10^e times the centres of 2^(e+6)
    equal parts of [0.1, 1].
    """
    values = [0.0, 1.0]
    for i in range(_EXPONENTS):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        centres = (10 ** (i - _EXPONENTS + 1)) * (bounds[:-1] + bounds[1:]) / 2.0
        values += [*centres.tolist(), *(-centres).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


def _nearest(values: Tensor) -> Tensor:
    """Index of the level that values in [-1, 1] are stored as. Any shape; returns uint8."""
    table = levels()
    midpoints = ((table[1:] + table[:-1]) / 2).to(values.device)
    lattice = torch.floor((values + 1) * (_STEPS / 2) + 0.5).clamp_(0, _STEPS)
    return torch.bucketize(lattice / (_STEPS / 2) - 1, midpoints, out_int32=True).to(torch.uint8)


def compress(scale: Tensor) -> Tensor:
    """Scales as stored bytes. scale: (R, G) float32; returns (stored_bytes(R * G),) uint8."""
    flat = scale.float().reshape(-1)
    offset = flat.mean()
    return torch.cat([offset.reshape(1).view(torch.uint8), _blocks(flat - offset)])


def extend(stored: Tensor, count: int, scale: Tensor) -> Tensor:
    """The stored bytes of `count` scales as they are, and those of more scales after them.

    New scales that fall into the last stored block take its absmax, and are cut off beyond it.
    scale: (R, G) float32, > 0; returns (stored_bytes(count + R * G),) uint8.
    """
    flat = scale.float().reshape(-1) - stored[:_FLOAT_BYTES].clone().view(torch.float32)
    room = min(-count % BLOCK, len(flat))
    start = stored_bytes(count - count % BLOCK)  # where the last block begins, if it has room
    if room:
        absmax = stored[start : start + _FLOAT_BYTES].clone().view(torch.float32)
        within = torch.where(absmax > 0, flat[:room] / absmax, 0.0).clamp(-1, 1)
        stored = torch.cat([stored, _nearest(within) * (absmax > 0)])
    return torch.cat([stored, _blocks(flat[room:])])


def _blocks(flat: Tensor) -> Tensor:
    """The bytes of scales less the offset: for every 256 their absmax and codes. flat: (C,)."""
    count = len(flat)
    blocks = torch.nn.functional.pad(flat, (0, -count % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    reciprocal = torch.where(absmax > 0, 1.0 / absmax, 0.0)
    codes = _nearest(blocks * reciprocal) * (absmax > 0)
    rows = torch.cat([absmax.view(torch.uint8), codes], dim=1).reshape(-1)
    return rows[: stored_bytes(count) - _FLOAT_BYTES]


def expand(stored: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `compress` up to rounding. stored: uint8; returns `shape` float32."""
    count = shape[0] * shape[1]
    offset = stored[:_FLOAT_BYTES].clone().view(torch.float32)
    rest = -count % BLOCK
    rows = torch.nn.functional.pad(stored[_FLOAT_BYTES:], (0, rest)).view(-1, _FLOAT_BYTES + BLOCK)
    absmax = rows[:, :_FLOAT_BYTES].contiguous().view(torch.float32)
    table = levels().to(stored.device)
    scale = table[rows[:, _FLOAT_BYTES:].int()] * absmax + offset
    return scale.view(-1)[:count].view(shape)
