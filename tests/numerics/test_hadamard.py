"""Hadamard matrices are exact, and rotations made of them keep what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropoint.numerics import hadamard
from zeropoint.numerics.hadamard import factor_orders, rotation

SMALL = [n for n in range(1, 261) if factor_orders(n) is not None]
WIDTHS = (576, 768, 896, 960, 1152, 1536, 2048, 2304, 2560, 3072, 3584, 3840, 4096, 4864, 5376)
HEADS = (32, 48, 64, 72, 80, 96, 112, 128, 256)


def exact(n: int) -> torch.Tensor:
    """The matrix in integers that hold n * n."""
    matrix = hadamard.hadamard(n)
    assert matrix is not None and matrix.dtype == torch.int8
    return matrix.long()


@pytest.mark.parametrize("n", SMALL)
def test_rows_are_orthogonal_in_integers(n):
    matrix = exact(n)
    assert matrix.shape == (n, n) and matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.long))
    assert matrix[:, 0].eq(1).all()


@pytest.mark.parametrize("n", [n for n in WIDTHS if n <= 1536])
def test_widths_of_real_models_are_orders(n):
    matrix = exact(n).double()  # exact: sums of n ones
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [*WIDTHS, *HEADS])
def test_real_sizes_are_products_of_small_orders(n):
    orders = factor_orders(n)
    assert orders is not None and torch.tensor(orders).prod() == n
    assert sum(orders) <= 100  # multiplications for each entry


def test_two_thirds_of_the_multiples_of_four_are_reached():
    # Paley I of primes (12, 44), Paley II of primes (36, 76) and of 25 (52) and 49 (100).
    assert {12, 20, 28, 36, 44, 52, 60, 76, 84, 100} <= set(SMALL)
    assert sum(factor_orders(n) is not None for n in range(4, 4097, 4)) == 686


@pytest.mark.parametrize("q", [3, 5, 7, 9, 11, 13, 25, 49])
def test_half_of_a_field_is_squares(q):
    matrix = hadamard._jacobsthal(q).long()
    assert matrix.diagonal().eq(0).all()
    assert matrix.sum() == 0 and matrix.abs().sum() == q * (q - 1)
    # Q Q^T = q I - J, Q J = 0: what makes it a conference matrix
    ones = torch.ones(q, q, dtype=torch.long)
    assert torch.equal(matrix @ matrix.T, q * torch.eye(q, dtype=torch.long) - ones)
    assert torch.equal(matrix, matrix.T if q % 4 == 1 else -matrix.T)


@pytest.mark.parametrize("n", [0, 3, 5, 6, 9, 10, 92, 116, 1998])
def test_other_sizes_have_none(n):
    assert factor_orders(n) is None and hadamard.hadamard(n) is None


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 12, 45, 92, 576])
def test_a_rotation_is_orthogonal(n, keeps_mean):
    turn = rotation(n, seed=3, keeps_mean=keeps_mean)
    matrix = turn(torch.eye(n, dtype=torch.float64))
    # float64: n products of numbers below 1, in at most six steps
    assert (matrix @ matrix.T - torch.eye(n)).abs().max() < 10 * n * 2**-53
    assert turn.hadamard == (factor_orders(n) is not None)
    if keeps_mean:
        assert (matrix.sum(0) - 1).abs().max() < 10 * n * 2**-53
        assert (matrix.sum(1) - 1).abs().max() < 10 * n * 2**-53


@pytest.mark.parametrize("n", [64, 576, 896])
def test_one_large_entry_is_spread_over_all(n):
    flat = rotation(n, 0)(torch.eye(n, dtype=torch.float64))
    assert torch.allclose(flat.abs(), torch.tensor(n**-0.5, dtype=torch.float64))
    # Keeping the mean costs flatness: entries are sums of n random signs, of size 1 / n.
    round_ = rotation(n, 0, keeps_mean=True)(torch.eye(n, dtype=torch.float64))
    assert round_.abs().max() < 6 * n**-0.5
    kurtosis = ((round_ * n**0.5) ** 4).mean()
    assert 2 < kurtosis < 4  # 3 for normal numbers, n for the identity


@given(
    n=st.sampled_from([4, 12, 24, 45, 80, 96]),
    seed=st.integers(0, 2**31),
    keeps_mean=st.booleans(),
)
def test_lengths_and_products_stay(n, seed, keeps_mean):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 3, n, generator=generator, dtype=torch.float64)
    turn = rotation(n, seed, keeps_mean=keeps_mean)
    assert torch.allclose(turn(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.allclose(turn(x) @ turn(y).T, x @ y.T)


@pytest.mark.parametrize("n", [96, 576])
def test_factors_multiply_as_the_whole_matrix_does(n):
    turn = rotation(n, 5)
    whole = turn.signs[:, None] * exact(n).double() / n**0.5
    x = torch.randn(7, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(turn(x), x @ whole, rtol=0, atol=1e-13)
    assert torch.equal(turn(x.float()), turn(x.float().double()).float())


def test_vectors_are_rotated_chunk_by_chunk_alike(monkeypatch):
    turn, x = rotation(12, 0), torch.randn(5, 4, 12, generator=torch.Generator().manual_seed(0))
    whole = turn(x)
    monkeypatch.setattr(hadamard, "CHUNK_ELEMENTS", 36)
    assert torch.equal(turn(x), whole) and whole.shape == x.shape


def test_the_seed_draws_the_signs():
    x = torch.eye(576)
    assert torch.equal(rotation(576, 1)(x), rotation(576, 1)(x))
    assert not torch.equal(rotation(576, 1)(x), rotation(576, 2)(x))
    assert torch.equal(rotation(92, 1)(torch.eye(92)), rotation(92, 1)(torch.eye(92)))
