"""Mean squared error on N(0, 1): numerical integration, and table 5.3 of reference/accuracy.md."""

import functools
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from tests.helpers import GRIDS, SCALED, grid_points
from zeropoint.numerics import Grid, dequantize, get_format, quantize

GROUP = 128
SAMPLES = 4 * 2**20
# Sampling: the squared error of one sample has a relative deviation below 3, so the mean of 4M is
# within 0.15 % at one deviation and 1 % at six. The rest is for the third digit of the table.
TABLE_TOLERANCE, INTEGRAL_TOLERANCE = 0.02, 0.01


@functools.lru_cache(maxsize=1)
def gaussian():
    return torch.randn(SAMPLES // 512, 512, generator=torch.Generator().manual_seed(0))


@functools.cache
def mse(name, symmetric, group_size=GROUP, rows=None, scale_dtype="float32"):
    weight = gaussian()[:rows]
    q = quantize(
        weight,
        name,
        granularity="group" if group_size else "tensor",
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )
    image = dequantize(*q, name)
    return (weight - image).square_().mean(dtype=torch.float64).item()


def integrated_mse(fmt, block: int) -> float:
    """E (x - m Q(x / m))^2 for `block` values of N(0, 1) whose largest magnitude is m.

    m has density block * F(m)^(block - 1) * f(m), with F, f those of |x|. The largest value itself
    is exact; given m, the others are N(0, 1) cut to [-m, m]. Both integrals by the midpoint rule.
    """
    levels = grid_points(fmt, Grid(torch.ones(1, 1))).flatten().unique().numpy() / fmt.real_max
    levels = levels[np.abs(levels) <= 1]  # q_min of a symmetric integer grid is never used
    edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
    normal = NormalDist()
    largest = np.linspace(0, 7, 701)[1:] - 0.005
    inside = np.array([2 * normal.cdf(m) - 1 for m in largest])
    density = block * inside ** (block - 1) * 2 * np.exp(-(largest**2) / 2) / math.sqrt(2 * math.pi)
    error = np.zeros_like(largest)
    fractions = (np.arange(64) + 0.5) / 64  # midpoints inside each cell of the quantizer
    for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True):
        x = largest[:, None] * (low + (high - low) * fractions)
        weight = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * largest[:, None] * (high - low) / 64
        error += ((x - largest[:, None] * level) ** 2 * weight).sum(1)
    given_largest = error / inside * (block - 1) / block
    return float((given_largest * density).sum() / density.sum())


SYMMETRIC = [f for f in SCALED if f.reach[0] == f.reach[1] and not f.learns_levels and f.width == 1]


@pytest.mark.parametrize("fmt", SYMMETRIC, ids=lambda f: f.name)
def test_symmetric_mse_equals_the_integral_over_the_largest_value(fmt):
    found = mse(fmt.name, True)
    assert found == pytest.approx(integrated_mse(fmt, GROUP), rel=INTEGRAL_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "symmetric", "group_size", "expected"),
    [
        ("int4", False, 128, 0.0101),
        ("int4", False, 32, 0.0065),
        ("int3", False, 128, 0.0465),
        ("int2", False, 128, 0.253),
        ("int4", True, 128, 0.0138),
        ("nf4", True, 64, 0.00845),  # that row has 8-bit scales, which cost less than the tolerance
    ],
)
def test_mse_is_that_of_table_5_3(name, symmetric, group_size, expected):
    assert mse(name, symmetric, group_size) == pytest.approx(expected, rel=TABLE_TOLERANCE)


def test_mxfp4_with_its_own_scales_costs_what_the_table_says():
    found = mse("mxfp4", True, 32, scale_dtype="float8_e8m0fnu")
    assert found == pytest.approx(0.0132, rel=TABLE_TOLERANCE)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codebook_mse_at_its_own_group_size_equals_the_integral(name):
    """fp4 is bitsandbytes' table, not the E2M1 of the row in table 5.3."""
    fmt = get_format(name)
    found = mse(name, True, fmt.group_size)
    assert found == pytest.approx(integrated_mse(fmt, fmt.group_size), rel=INTEGRAL_TOLERANCE)


@pytest.mark.parametrize("symmetric", [True, False])
def test_error_falls_with_bits(symmetric):
    names = [f.name for f in sorted(SCALED, key=lambda f: f.bits) if f.kind == "integer"]
    errors = [mse(name, symmetric, rows=256) for name in names]
    # A bit more halves the step, so the error falls to about a quarter; a third is asked for.
    assert all(fewer > 3 * more for fewer, more in zip(errors, errors[1:], strict=False)), errors


@pytest.mark.parametrize(
    ("name", "symmetric"), [g for g in GRIDS if get_format(g[0]).kind not in ("float8", "vector")]
)
def test_error_falls_with_smaller_groups(name, symmetric):
    """Not float8, whose step is a share of the value itself, nor vectors, whose scale does not
    follow the largest of them.
    """
    errors = [mse(name, symmetric, size, rows=64) for size in (None, 512, 128, 64, 32, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.5 * errors[-1]
