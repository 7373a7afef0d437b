"""Bit packing, low bits first: code i of a row occupies bits [i * bits, (i + 1) * bits) of the
row's bytes.

Rows start on a byte; the unused high bits of a row's last byte are zero. Example, bits = 3, codes 1
2 3:

    byte 0:  bit 7 ... 0  =  11 010 001       (low two bits of 3, then 2, then 1)
    byte 1:  bit 7 ... 0  =  0000000 0        (high bit of 3, then padding)
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row: ceil(columns * bits / 8)."""
    return (columns * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes. codes: (N, K) uint8 in [0, 2^bits); returns (N, row_bytes(K, bits))
    uint8.

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), bits=3)
    tensor([[209,   0]], dtype=torch.uint8)
    """
    n, k = codes.shape
    if bits == 8:
        return codes.clone(memory_format=torch.contiguous_format)
    count = -(-k // 8)  # 8 codes fill `bits` bytes
    eights = torch.nn.functional.pad(codes, (0, -k % 8)).reshape(n, count, 8)
    packed = torch.zeros(n, count, bits, dtype=torch.uint8, device=codes.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= (
            eights[..., i] << shift
        )  # uint8 arithmetic drops the bits that overflow
        if shift + bits > 8:
            packed[..., byte + 1] |= eights[..., i] >> (8 - shift)
    return packed.view(n, count * bits)[:, : row_bytes(k, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack`. packed: (N, row_bytes(columns, bits)) uint8; returns (N, columns) uint8.

    >>> unpack(torch.tensor([[209, 0]], dtype=torch.uint8), bits=3, columns=3)
    tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    if bits == 8:
        return packed.clone()
    mask = (1 << bits) - 1
    if 8 % bits == 0:  # codes do not cross bytes: whole-byte operations, several times faster
        shifted = [packed >> shift for shift in range(0, 8, bits)]
        return (
            torch.stack(shifted, dim=-1)
            .view(len(packed), packed.shape[1] * 8 // bits)[:, :columns]
            .bitwise_and_(mask)
        )
    n, count = packed.shape[0], -(-columns // 8)
    padding = (0, count * bits - packed.shape[1])
    packed = torch.nn.functional.pad(packed, padding).view(n, count, bits)
    codes = torch.empty(n, count, 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = packed[..., byte] >> shift
        if shift + bits > 8:
            code = code | (packed[..., byte + 1] << (8 - shift))
        codes[..., i] = code & mask
    return codes.view(n, count * 8)[:, :columns]
