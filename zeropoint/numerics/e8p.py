"""E8P: 2^16 codewords of 8 values, 2 bits a value. QuIP# (arXiv:2402.04396), section 4.2.

    codeword = signs * pattern + shift          real = scale * codeword

pattern: absolute values 1/2, 3/2, 5/2, 256 of them: all 227 of |p|^2 <= 10, and 29 of |p|^2 = 12.
signs: those with an even sum of signs * pattern, so seven are free. Such points are the lattice
D8 + 1/2. shift: -1/4 or 1/4 for all eight values; both together are E8 + 1/4, the densest packing
there is in 8 dimensions.

A codeword is 16 bits, here called a word: bits 0 to 7 say the pattern, 8 to 14 which of the first
seven values are negative, 15 that the shift is 1/4. Cut into eight codes of two bits, low bits
first, it lies in a weight as the codes of any other format do.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, permutations

import torch
from torch import Tensor

from zeropoint.numerics.affine import round_scale_up

WIDTH = 8  # values of a codeword
SHIFT = 0.25
OF_NORM_12 = 29  # 256 - 227
CHUNK = 1 << 13  # vectors at a time: the temporaries stay in the cache
SCALE_TO_RMS = 0.96  # of the scale of least squared error for a Gaussian, to one percent

# Wholes above 1/2 of the patterns of |p|^2 <= 10, values in descending order.
_SHAPES = (
    (0,) * 8,
    (1,) + (0,) * 7,
    (1,) * 2 + (0,) * 6,
    (1,) * 3 + (0,) * 5,
    (1,) * 4 + (0,) * 4,
    (2,) + (0,) * 7,
    (2, 1) + (0,) * 6,
)
_SHAPE_OF_NORM_12 = (1,) * 5 + (0,) * 3


@lru_cache
def wholes() -> Tensor:
    """The patterns in the order of their index, less 1/2. (256, 8) int64.

    Of the 56 with five values of 3/2 every coordinate should be in about as many: they are taken by
    the sum of the places of the other three modulo 8, which has seven for each remainder.
    """
    of_shapes = {pattern for shape in _SHAPES for pattern in permutations(shape)}
    threes = sorted(combinations(range(WIDTH), 3), key=lambda places: (sum(places) % 8, places))
    of_norm_12 = [
        tuple(int(i not in places) for i in range(WIDTH)) for places in threes[:OF_NORM_12]
    ]
    return torch.tensor(sorted(of_shapes) + of_norm_12, device="cpu")


@lru_cache
def codewords(device: torch.device) -> Tensor:
    """Every codeword, by its word. (65536, 8) float32."""
    words = torch.arange(1 << 16, device="cpu")
    pattern = wholes()[words & 0xFF] + 0.5
    negative = (words.unsqueeze(1) >> torch.arange(8, 15, device="cpu")) & 1
    odd = (pattern.sum(1).long() + negative.sum(1)) & 1  # and the eighth sign makes it even
    signs = 1.0 - 2.0 * torch.cat([negative, odd.unsqueeze(1)], dim=1)
    shift = (words >> 15) * 2 * SHIFT - SHIFT
    return (signs * pattern + shift.unsqueeze(1)).float().to(device)


class _Tables:
    """What `nearest` looks up, on one device."""

    def __init__(self, device: torch.device) -> None:
        def table(rows: object, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(rows, dtype=dtype, device=device)

        self.shapes = table(_SHAPES)
        self.norm_12 = table(_SHAPE_OF_NORM_12) + 0.5
        self.last = wholes()[-OF_NORM_12:].to(device, torch.float32) + 0.5
        self.thirds = 3 ** torch.arange(WIDTH, device=device)
        index = torch.zeros(3**WIDTH, dtype=torch.long, device=device)
        index[(wholes().to(device) * self.thirds).sum(1)] = torch.arange(256, device=device)
        self.index = index
        self.shifts = table([-SHIFT, SHIFT])
        self.sign_bits = 1 << torch.arange(8, 16, device=device)


_tables = lru_cache(_Tables)


def nearest(vectors: Tensor) -> Tensor:
    """The word of the codeword nearest to each vector. vectors: (V, 8) float32; returns (V,) int64.

    Exact, but for ties. |t - c|^2 is least where 2 t.c - |c|^2 is greatest. For given absolute
    values u of t - shift, and a shape, the largest values of the pattern belong where u is largest;
    where the sum would be odd, the smallest u, which has a 1/2, takes the other sign: exchanging
    two values shows that no other order and no other sign is better. The 29 are not all the orders
    of their shape, so each is asked, but only where the best order of all would win.
    """
    tables = _tables(vectors.device)
    return torch.cat([_nearest(part, tables) for part in vectors.split(CHUNK)])


def _nearest(vectors: Tensor, tables: _Tables) -> Tensor:
    moved = vectors.unsqueeze(1) - tables.shifts.view(2, 1)  # (V, 2, 8)
    negative = moved < 0
    size, order = moved.abs().sort(dim=-1, descending=True)
    odd = (negative.sum(-1) & 1).bool()
    shapes = tables.shapes + 0.5
    wrong = odd.unsqueeze(-1) != (shapes.sum(1) % 2).bool()  # (V, 2, 7)
    gain = 2 * size @ shapes.T - shapes.square().sum(1) - 2 * size[..., 7:] * wrong
    gain, shape = gain.max(-1)
    pattern = torch.zeros_like(size).scatter_(-1, order, tables.shapes[shape])
    flipped = torch.where(wrong.gather(-1, shape.unsqueeze(-1)), order[..., 7:], WIDTH)

    hoped = 2 * size @ tables.norm_12 - tables.norm_12.square().sum() - 2 * size[..., 7] * ~odd
    asked = hoped > gain
    if bool(asked.any()):
        products = moved[asked].abs().unsqueeze(1) * tables.last  # (M, 29, 8)
        least, place = products.min(-1)
        wrong_12 = ~odd[asked].unsqueeze(1)
        gain_12 = 2 * products.sum(-1) - tables.last[0].square().sum() - 4 * least * wrong_12
        gain_12, which = gain_12.max(-1)
        better = gain_12 > gain[asked]
        at = asked.nonzero()[better].unbind(1)
        which = which[better]
        gain[at] = gain_12[better]
        pattern[at] = tables.last[which] - 0.5
        place = place[better].gather(1, which.unsqueeze(1))
        flipped[at] = torch.where(wrong_12[better], place, WIDTH)

    # |t - shift|^2 differs between the shifts by 2 shift sum t
    upper = gain[:, 1] + SHIFT * 4 * vectors.sum(1) > gain[:, 0]
    rows = torch.arange(len(vectors), device=vectors.device)
    best = upper.long()
    places = torch.arange(WIDTH, device=vectors.device)
    signs = negative[rows, best] ^ (places == flipped[rows, best])
    index = tables.index[(pattern[rows, best].long() * tables.thirds).sum(1)]
    bits = torch.cat([signs[:, :7], upper.unsqueeze(1)], dim=1)
    return index + (bits * tables.sign_bits).sum(1)


def vector_codes(blocks: Tensor, scale: Tensor) -> Tensor:
    """The codes of the codewords nearest to real / scale, eight values each.

    blocks: (R, G, B) float, B a multiple of 8; scale: (R, G) > 0. Returns (R, G, B) uint8, below 4.
    """
    vectors = (blocks.float() / scale.unsqueeze(-1).float()).reshape(-1, WIDTH)
    words = nearest(vectors).to(torch.int32).unsqueeze(1)
    pieces = words >> torch.arange(0, 16, 2, device=words.device, dtype=torch.int32)
    return (pieces & 3).to(torch.uint8).view(blocks.shape)


def vector_values(codes: Tensor, scale: Tensor) -> Tensor:
    """real = scale * codeword. codes: (R, G, B) uint8; scale: (R, G); returns float32."""
    pieces = codes.reshape(-1, WIDTH).to(torch.int32)
    words = (pieces << torch.arange(0, 16, 2, device=codes.device, dtype=torch.int32)).sum(1)
    reals = codewords(codes.device)[words].view(codes.shape)
    return reals.mul_(scale.unsqueeze(-1).float())


def vector_scale(blocks: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The scale for values of a Gaussian: SCALE_TO_RMS times their root mean square.

    blocks: (R, G, B) float. Returns (R, G) of scale_dtype, > 0. Raises ScaleRangeError.
    """
    rms = blocks.double().square().mean(-1).sqrt()
    return round_scale_up(SCALE_TO_RMS * rms, scale_dtype)
