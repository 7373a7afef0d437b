"""Answers are checked before they are timed (STYLE 24). Checkers raise WrongAnswerError."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zeropoint.kernels import reference
from zeropoint.qtensor import QTensor

UNIT_ROUNDOFF = 2.0**-24  # of float32
BFLOAT16_ROUNDOFF = 2.0**-9
Q_MAX = {"integer": 127 * 256 + 127, "codebook": (1 << 14) - 1}  # activations of the native kernel

CHECKED_ROWS, CHECKED_TOKENS = 32, 8

# Roundings of random numbers are independent, so their sum grows with sqrt(K): it is larger than
# LAMBDA standard bounds with probability 2 K exp(-LAMBDA^2 / 2) (Higham & Mary, A New Approach to
# Probabilistic Rounding Error Analysis, SISC 41(5), 2019, theorem 2.4): 1e-10 at K = 4096.
LAMBDA = 8.0


class WrongAnswerError(AssertionError):
    """What was to be timed does not compute what it should."""


def sample(count: int, most: int) -> Tensor:
    """At most `most` of `count` indices, evenly spread, both ends included."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def check_linear(
    name: str, y: Tensor, x: Tensor, weight: QTensor, *, as_bfloat16: bool = False
) -> float:
    """y = x @ weight.T on a sample, against the float64 oracle. Returns the largest error / bound.

    y: (M, N); x: (M, K) of random numbers; weight: (N, K). as_bfloat16: the kernel may round x
    and the weight to bfloat16. Raises WrongAnswerError.
    """
    rows = sample(weight.shape[0], CHECKED_ROWS)
    tokens = sample(len(x), CHECKED_TOKENS)
    x, part = x[tokens].double(), weight.rows(rows)
    expected = reference.linear(x, part, None)
    bound = _bound(x, part, as_bfloat16)
    limits = torch.finfo(y.dtype)
    bound += limits.eps / 2 * (expected.abs() + bound) + limits.smallest_normal
    error = (y[tokens][:, rows].double() - expected).abs() / bound
    worst = error.max().item()  # a NaN stays one
    if not worst <= 1:
        raise WrongAnswerError(f"{name}, M={len(y)}: error is {worst:.3g} x what rounding explains")
    return worst


def _bound(x: Tensor, weight: QTensor, as_bfloat16: bool) -> Tensor:
    """What rounding can do to x @ weight.T before the result is stored. x: (M, K) float64.

    float32 sums: LAMBDA sqrt(K) u S and 4 u S for scales and products, S = |x| @ |weight|.T. Codes
    of integer formats are multiplied unsigned, which adds up to scale * 2^bits to |weight|, by
    activations of 16 bits: an error below step / 2 each, so LAMBDA / 2 * step * |weight|_2
    (Hoeffding); those of a codebook by 15 bits, and its levels are off by 2^-14 of the largest of
    a group at most. A kernel may round an 8-bit activation that is almost half way to the other
    side. AMX takes a float32 value for the sum of two bfloat16, off by 2^-18 of it, and leaves out
    the product of the second ones, 2^-18 of the whole.
    """
    scheme, k = weight.scheme, x.shape[1]
    values = reference.weight_values(weight)
    magnitudes = values.abs()
    if scheme.fmt.kind == "integer":
        assert weight.scale is not None
        scale = weight.scale.double().expand(len(values), -1)
        lift = scale.repeat_interleave(k // scale.shape[1], dim=1) * 2.0**scheme.fmt.bits
        magnitudes = magnitudes + lift
    bound = (LAMBDA * math.sqrt(k) + 4) * UNIT_ROUNDOFF * (x.abs() @ magnitudes.T)
    largest = x.abs().amax(dim=1, keepdim=True)
    if scheme.activations == "int8":
        quotient = 127 * x / largest
        from_half = (quotient - quotient.floor() - 0.5).abs()
        close = (from_half <= 4 * 128 * UNIT_ROUNDOFF).double()
        bound += largest / 127 * (close @ values.abs().T)
    elif scheme.fmt.kind in Q_MAX:
        bound += LAMBDA / 2 * largest / Q_MAX[scheme.fmt.kind] * values.norm(dim=1)
    if scheme.fmt.kind == "codebook":
        group = min(scheme.group_size or k, k)
        top = magnitudes.unflatten(1, (-1, group)).amax(-1).repeat_interleave(group, dim=1)
        bound += LAMBDA * 2.0**-14 * (x.square() @ top.square().T).sqrt()
    by_column = (x.square() @ values.square().T).sqrt()
    bound += LAMBDA * 3 * BFLOAT16_ROUNDOFF**2 * by_column
    if as_bfloat16:
        bound += LAMBDA * 2 * BFLOAT16_ROUNDOFF * by_column
    return bound


def mean_kl(expected: Tensor, got: Tensor) -> float:
    """Mean KL(expected || got) in nats. Both: (T, vocabulary) logits."""
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def check_logits(name: str, expected: Tensor, got: Tensor, most: float) -> float:
    """Returns the mean KL. Raises WrongAnswerError where it is above `most` nats, or NaN."""
    kl = mean_kl(expected, got)
    if not kl <= most:
        raise WrongAnswerError(f"{name}: mean KL {kl:.3g} from the oracle, at most {most:.3g}")
    return kl
