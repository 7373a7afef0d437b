"""Weights and Hessians for the tests of algorithms."""

from __future__ import annotations

import torch

from zeropoint.scheme import Scheme


def problem(n: int = 24, k: int = 64, tokens: int = 512, seed: int = 0):
    """weight (n, k) and inputs (tokens, k) whose channels are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5
    size = torch.logspace(-1, 1, k)[torch.randperm(k, generator=generator)]
    x = (torch.randn(tokens, k, generator=generator) @ mix + 0.1) * size
    return torch.randn(n, k, generator=generator) * 0.05, x


def hessian(x: torch.Tensor) -> torch.Tensor:
    """sum of x x^T, (K, K) float64."""
    return x.double().T @ x.double()


CALIBRATED = [
    Scheme.of("int8"),
    Scheme.of("int4"),
    Scheme.of("int4", group_size=16, symmetric=True),
    Scheme.of("int3", group_size=-1),
    Scheme.of("int2"),
    Scheme.of("int2", float_zero_point=True),
    Scheme.of("nf4", group_size=32),
    Scheme.of("fp4", group_size=32),
    Scheme.of("iq4nl"),
    Scheme.of("mxfp4"),
    Scheme.of("any4", group_size=16),
    Scheme.of("e8p", group_size=16),
    Scheme.of("float8_e4m3fn"),
    Scheme(format="int4", granularity="tensor", symmetric=False),
]
