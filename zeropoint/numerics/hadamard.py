"""Hadamard matrices, and the rotations made of them.

    H in {-1, +1}^(n x n),  H H^T = n I

so H / sqrt(n) is orthogonal, and spreads one large entry evenly over all n. With an (n) from each
of these there is one of their product, the Kronecker product:

    Sylvester   n = 2^m
    Paley I     n = q + 1,     q = 3 mod 4
    Paley II    n = 2 (q + 1), q = 1 mod 4       q a prime or the square of one

Source: Paley 1933, "On orthogonal matrices", J. Math. Phys. 12. Every n is a multiple of 4, or 1 or
2; not all multiples are reached (92 is the first that is not).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce

import torch
from torch import Tensor

PASS_COST = 16  # what one more pass over the vectors costs, in multiplications for each entry
CHUNK_ELEMENTS = 1 << 22  # of vectors at a time: 32 MB of float64


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """x -> x R for vectors of n entries. R = diag(signs) F; F diag(signs) F^T if it keeps the mean.

    F = F_1 (x) F_2 (x) ...; factors: (n_i, n_i) float64, orthogonal, each with a first column of
    equal entries; signs: (n,) float64, +-1, the first +1. So 1 R = 1 for one that keeps the mean:
    the vector of ones is the first column of F, times sqrt(n). hadamard: whether sqrt(n) F is a
    Hadamard matrix; if not, F is random.
    """

    factors: tuple[Tensor, ...]
    signs: Tensor
    keeps_mean: bool
    hadamard: bool

    @property
    def n(self) -> int:
        """Entries of a vector."""
        return len(self.signs)

    def __call__(self, x: Tensor) -> Tensor:
        """x R, computed in float64 and rounded to x's dtype. x: (..., n) float."""
        rows = x.reshape(-1, self.n)
        chunks = rows.split(max(1, CHUNK_ELEMENTS // self.n))
        return torch.cat([self._rotate(c.double()).to(x.dtype) for c in chunks]).reshape(x.shape)

    def _rotate(self, x: Tensor) -> Tensor:
        signs, factors = self.signs.to(x.device), [f.to(x.device) for f in self.factors]
        if not self.keeps_mean:
            return _times(x * signs, factors)
        return _times(_times(x, factors) * signs, [f.t() for f in factors])

    def __str__(self) -> str:
        if not self.hadamard:
            return "random orthogonal"
        return f"Hadamard {' x '.join(str(len(f)) for f in self.factors)}"


def _times(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """x (F_1 (x) F_2 (x) ...). x: (T, n) float64."""
    for factor in factors:  # the first axis of n is multiplied and becomes the last
        size = len(factor)
        x = (x.reshape(len(x), size, -1).transpose(1, 2) @ factor).reshape(x.shape)
    return x


def rotation(n: int, seed: int, *, keeps_mean: bool = False) -> Rotation:
    """A rotation of n entries drawn by `seed`: random signs and a Hadamard matrix, or where none of
    that order is known a random orthogonal one (QR of normal numbers, in float64).

    >>> str(rotation(576, 0)), str(rotation(92, 0))
    ('Hadamard 12 x 12 x 4', 'random orthogonal')
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    signs[0] = 1
    orders = factor_orders(n)
    if orders is None:
        normal = torch.randn(n, n, generator=generator, dtype=torch.float64)
        normal[:, 0] = 1
        q, r = torch.linalg.qr(normal)
        factors = [q * r.diagonal().sign()]
    else:
        factors = [_primitive(order).double() / math.sqrt(order) for order in orders]
    return Rotation(
        factors=tuple(factors), signs=signs, keeps_mean=keeps_mean, hadamard=orders is not None
    )


def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix whose first column is ones, (n, n) int8; None where none is known here.

    >>> hadamard(4)
    tensor([[ 1,  1,  1,  1],
            [ 1, -1,  1, -1],
            [ 1,  1, -1, -1],
            [ 1, -1, -1,  1]], dtype=torch.int8)
    """
    orders = factor_orders(n)
    return None if orders is None else reduce(torch.kron, map(_primitive, orders))


@cache
def factor_orders(n: int) -> tuple[int, ...] | None:
    """Orders whose product is n and whose Kronecker product is cheapest to multiply by; None where
    there are none.

    >>> factor_orders(4096), factor_orders(896), factor_orders(92)
    ((8, 8, 8, 8), (28, 8, 4), None)
    """
    if n < 1 or n > 2 and n % 4:
        return None
    known: list[tuple[int, ...]] = [(n,)] if _is_primitive(n) else []
    for order in range(2, math.isqrt(n) + 1):
        if n % order == 0:
            parts = factor_orders(order), factor_orders(n // order)
            known += [tuple(sorted(a + b, reverse=True)) for a, b in [parts] if a and b]
    return min(known, key=lambda orders: sum(o + PASS_COST for o in orders), default=None)


def _is_primitive(n: int) -> bool:
    """Whether Sylvester or Paley give the order by itself."""
    return n & (n - 1) == 0 or _paley_field(n) is not None


def _paley_field(n: int) -> int | None:
    """The q of a Paley construction of order n, a multiple of 4."""
    for q, remainder in ((n - 1, 3), (n // 2 - 1, 1)):
        if q % 4 == remainder and _characteristic(q) is not None:
            return q
    return None


@cache
def _primitive(n: int) -> Tensor:
    """A Hadamard matrix by one construction, its first column ones. (n, n) int8."""
    q = _paley_field(n)
    if n & (n - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.int8)
        while len(matrix) < n:
            matrix = torch.kron(_signs("++", "+-"), matrix)
    else:
        assert q is not None
        sign = -1 if q % 4 == 3 else 1  # the conference matrix is skew, or symmetric
        conference = torch.zeros(q + 1, q + 1, dtype=torch.int8)
        conference[0, 1:], conference[1:, 0] = 1, sign
        conference[1:, 1:] = _jacobsthal(q)
        identity = torch.eye(q + 1, dtype=torch.int8)
        if q % 4 == 3:
            matrix = conference + identity
        else:
            matrix = torch.kron(conference, _signs("++", "+-"))
            matrix += torch.kron(identity, _signs("+-", "--"))
    return matrix * matrix[:, :1]


def _signs(*rows: str) -> Tensor:
    return torch.tensor([[1 if c == "+" else -1 for c in row] for row in rows], dtype=torch.int8)


def _jacobsthal(q: int) -> Tensor:
    """Q_xy = 1 if x - y is a square of GF(q), -1 if it is none, 0 if it is 0. (q, q) int8.

    Elements are b + a i, numbered a p + b, with i^2 no square mod p; a = 0 where q is a prime.
    """
    p = _characteristic(q)
    assert p is not None
    a, b = torch.arange(q) // p, torch.arange(q) % p
    squares = set((torch.arange(p) ** 2 % p).tolist())
    i_squared = next(r for r in range(p) if r not in squares)
    character = torch.full((q,), -1, dtype=torch.int8)
    character[2 * a * b % p * p + (b * b + i_squared * a * a) % p] = 1
    character[0] = 0
    a, b = (a[:, None] - a) % p, (b[:, None] - b) % p
    return character[a * p + b]


def _characteristic(q: int) -> int | None:
    """p where q is an odd prime p or its square; None for other numbers."""
    for p in (q, math.isqrt(q)):
        if p > 2 and q in (p, p * p) and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p
    return None
