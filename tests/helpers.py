"""Cases and checkers shared by the tests.

Checkers raise AssertionError; `numerics/test_helpers.py` shows that they can.

Rounding slack, used below: u = 2^-24 is the unit roundoff of float32. `normalised = fl(w / s)` is
off by at most u |w / s|, and `image = fl(s * code)` by at most u |image|. A wrong decision between
two neighbouring codes is possible only when the normalised value is that close to their midpoint,
and costs twice the distance to it.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import settings

from zeropoint import native
from zeropoint.algorithms import get_algorithm
from zeropoint.kernels import reference
from zeropoint.kernels.reference import weight_values
from zeropoint.nn import QModule
from zeropoint.numerics import FORMATS, Format, Grid, e8p
from zeropoint.qtensor import QTensor
from zeropoint.scheme import PER_CHANNEL, Scheme

UNIT_ROUNDOFF = 2.0**-24
SUBNORMAL = 2.0**-149  # smallest positive float32

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40, database=None)

SCALED = [f for f in FORMATS.values() if f.kind != "downcast"]
INTEGERS = [f for f in FORMATS.values() if f.kind == "integer"]
CODEBOOKS = [f for f in FORMATS.values() if f.kind == "codebook"]
TABLES = [f for f in CODEBOOKS if not f.learns_levels]  # whose levels are the format's
DOWNCASTS = [f for f in FORMATS.values() if f.kind == "downcast"]


def has_units(fmt: Format) -> bool:
    """Whether the grid has -1, 0 and 1, so that constants and zeros are exact. Not iq4nl's, nor one
    that is learned, nor that of vectors.
    """
    if fmt.width > 1:
        return False
    return fmt.kind != "codebook" or {-1.0, 0.0, 1.0} <= set(fmt.levels or ())


def symmetries(fmt: Format) -> tuple[bool, ...]:
    """The values of `symmetric` that a format allows."""
    return (True, False) if fmt.kind == "integer" else (True,)


GRIDS = [(f.name, symmetric) for f in SCALED for symmetric in symmetries(f)]
"""(format, symmetric) of everything that has a scale."""
OF_ONE = [(name, symmetric) for name, symmetric in GRIDS if FORMATS[name].width == 1]
"""The same without vectors: every value has a code of its own."""


def schemes(group_size: int = 32) -> list[Scheme]:
    """Every format, symmetric or not if it may, per tensor, per channel and per group; codebooks
    with scales in 8 bits, integers with float zero points and formats with their own scales too.
    """
    result = [Scheme.of(f.name) for f in DOWNCASTS]
    for name, symmetric in GRIDS:
        for granularity in ("tensor", "channel", "group"):
            grouped = granularity == "group"
            result.append(
                Scheme(
                    format=name,
                    granularity=granularity,
                    group_size=group_size if grouped else None,
                    symmetric=symmetric,
                    scale_dtype="float16" if grouped else "float32",
                )
            )
    result += [Scheme.of(f.name, group_size=group_size) for f in SCALED if f.scale_dtype]
    result += [Scheme.of(f.name, group_size=group_size, double_quant=True) for f in CODEBOOKS]
    return result + float_zeros(group_size)


def by_threes() -> list[Scheme]:
    """`schemes` whose groups are 3 codes, or the codes of 3 vectors."""
    return [s for width in (1, 8) for s in schemes(3 * width) if s.fmt.width == width]


def float_zeros(group_size: int = 32) -> list[Scheme]:
    """Every integer format with a float zero point for each group; int3 per channel and tensor."""
    result = [Scheme.of(f.name, group_size=group_size, float_zero_point=True) for f in INTEGERS]
    per_channel = Scheme.of("int3", group_size=PER_CHANNEL, float_zero_point=True)
    return [*result, per_channel, replace(per_channel, granularity="tensor")]


def defaults() -> list[Scheme]:
    """The default scheme of every format, that of bitsandbytes, and one like HQQ's."""
    others = [Scheme.of("nf4", double_quant=True), Scheme.of("int2", float_zero_point=True)]
    return [*(Scheme.of(name) for name in FORMATS), *others]


def example_weight(n: int = 5, k: int = 96, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(n, k) of both signs, with an outlier, a zero row, and a row that is all negative."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    weight[0, 1] = 40.0
    weight[1 % n] = 0.0
    weight[2 % n] = -weight[2 % n].abs()
    return weight.to(dtype)


def rtn(weight: torch.Tensor, scheme: Scheme) -> QTensor:
    """The weight rounded to nearest."""
    return get_algorithm("rtn")(weight.detach(), scheme)


def freeze(module: QModule) -> QModule:
    """Freeze a live module with round to nearest; returns it."""
    module.freeze(rtn(module.float_weight(), module.scheme))
    return module


# --- grids, written from the formulas -------------------------------------------------------------


def grid_points(fmt: Format, grid: Grid):
    """Every value a block can hold at scale 1. Returns (R, G, number of codes) float64."""
    if fmt.kind == "integer":
        points = torch.arange(fmt.q_min, fmt.q_max + 1, dtype=torch.float64)
    elif grid.levels is not None:
        points = grid.levels.double().unsqueeze(1)
    elif fmt.kind == "codebook":
        points = torch.tensor(fmt.levels, dtype=torch.float64)
    else:
        points = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).double()
        points = points[points.isfinite()]
    points = points.expand(*grid.scale.shape, -1)
    return points if grid.zero_point is None else points - grid.zero_point.double().unsqueeze(-1)


# --- checkers -------------------------------------------------------------------------------------


def assert_nearest(values, image, grid: Grid, fmt: Format) -> None:
    """No point of the grid is nearer to a value than its image, up to rounding.

    values, image: (R, G, B) float32. Slack: 4 u (|w| + |image| + s), see the top.
    """
    values, image, scale = values.double(), image.double(), grid.scale.double().unsqueeze(-1)
    if fmt.width > 1:
        _assert_nearest_vectors(values, image, scale)
        return
    points = scale * grid_points(fmt, grid)
    nearest = (values.unsqueeze(-1) - points.unsqueeze(-2)).abs().amin(-1)
    slack = 4 * UNIT_ROUNDOFF * (values.abs() + image.abs() + scale) + SUBNORMAL
    _assert_below((values - image).abs(), nearest + slack, "distance to the nearest grid point")


def _assert_nearest_vectors(values, image, scale) -> None:
    """No codeword is nearer to eight values than their image is. (R, G, B) float64; (R, G, 1).

    2 t.c - |c|^2 sums 8 products of two parts each: 32 u |t| |c|, and |c| < 5. Slack: 64 u of the
    square, in units of the weight, for both words that are compared.
    """
    scale = scale.expand_as(values).reshape(-1, 8)[:, :1]
    values, image = values.reshape(-1, 8), image.reshape(-1, 8)
    codewords = e8p.codewords(torch.device("cpu")).double()
    parts = (values / scale).split(64)  # 32 MB of distances
    least = torch.cat([torch.cdist(part, codewords).amin(1) for part in parts])
    nearest = (least * scale[:, 0]).square()
    slack = 64 * UNIT_ROUNDOFF * (values.norm(dim=1) + 5 * scale[:, 0]).square() + SUBNORMAL
    found = (values - image).square().sum(1)
    _assert_below(found, nearest + slack, "distance to the nearest codeword")


def assert_within_half_step(values, image, scale) -> None:
    """|w - image| <= scale / 2. values, image: (R, G, B) float32; scale: (R, G).

    Slack: 2 u |w| for the quotient and u |image| for the product. The zero point was rounded in
    float64, so the grid may end half a step inside the range: 2^-40 steps more than cover that.
    """
    values, image, scale = values.double(), image.double(), scale.double().unsqueeze(-1)
    slack = 2 * UNIT_ROUNDOFF * (values.abs() + image.abs()) + scale * 2.0**-40
    _assert_below((values - image).abs(), scale / 2 + slack, "half a step")


def assert_linear(y, x, weight: QTensor, bias=None, kernel="torch") -> None:
    """y = x @ weight.T + bias, to the rounding of x's dtype. y: (..., N); x: (..., K).

    S = |x| @ |weight|.T, summed in float32 whatever x is: 2 K eps S (STYLE 19) + the bias added.
    A 16-bit x with roundoff v rounds the weight (v S), the product and the sum with the bias (v of
    their size each), and what underflows (one subnormal each; of float32 everywhere, where iq4nl
    has a zero). The native kernel multiplies integer weights and levels of codebooks by integer
    activations: see `integer_bound`; what is below float32's normal range may become 0. AMX takes
    a float32 value for the sum of two bfloat16, which leaves 2^-18 of it, and leaves out the
    product of the second ones. Int8 activations are rounded before all of this, the same way by
    every kernel.
    """
    real = _values(weight)
    wide = x.double()
    int8 = weight.scheme.activations == "int8"
    if int8:
        wide = reference._int8_tokens(x)
    expected, size = wide @ real.T, wide.abs() @ real.abs().T
    if bias is not None:
        expected = expected + bias.double()
    limits = torch.finfo(x.dtype)
    eps = torch.finfo(torch.float32).eps
    bound = 2 * x.shape[-1] * eps * size + limits.eps * (expected.abs() + _magnitude(bias))
    bound = bound + SUBNORMAL * (1 + wide.abs().sum(-1, keepdim=True))
    if kernel == "native":
        tiny = torch.finfo(torch.float32).smallest_normal
        bound = bound + tiny * (1 + real.abs().sum(-1))
        if weight.scheme.fmt.kind in ("integer", "codebook"):
            bound = bound + integer_bound(wide, weight, real, int8)
        if native.instruction_set() == "amx":
            bound = bound + 3 * 2.0**-18 * size + tiny * wide.abs().sum(-1, keepdim=True)
    if x.dtype != torch.float32:
        roundoff = limits.eps / 2
        roundings = 2 if int8 else 1  # of the weight, and of the token once it is on its grid
        bound = bound + roundings * roundoff * size
        bound = bound + 3 * roundoff * (expected.abs() + _magnitude(bias))
        tiny = limits.smallest_normal * limits.eps
        bound = bound + tiny * (2 + wide.abs().sum(-1, keepdim=True))
    assert y.dtype == x.dtype, f"{y.dtype}, not {x.dtype}"
    _assert_below((y.double() - expected).abs(), bound, "rounding")


# Largest activation of the native kernel.
Q_MAX = {"integer": 127 * 256 + 127, "codebook": (1 << 14) - 1}
BLOCK = 128  # columns that share an activation scale, or fewer where a group is smaller


def integer_bound(x, weight: QTensor, real, int8: bool) -> torch.Tensor:
    """What integer activations cost. x: (..., K) float64; real: (N, K) float64.

    x = s q is off by s / 2 at most, with s = max |x| / Q_MAX of a block (and the roundings of s
    itself, a few eps of x): |w| sums that. With int8 activations x is on its grid already. The sums
    are those of `summing_bound`. Levels of a codebook become integers times 2^-13 of the largest
    at most, so are off by half of that, and |x| sums it.
    """
    k = real.shape[1]
    size = weight.scheme.group_size or k
    block = next((b for b in (128, 64, 32) if size % b == 0), 32) if size < k else BLOCK
    padding = -k % block
    blocks = torch.nn.functional.pad(x.abs(), (0, padding)).unflatten(-1, (-1, block))
    weights = torch.nn.functional.pad(real.abs(), (0, padding)).unflatten(-1, (-1, block)).sum(-1)
    eps = torch.finfo(torch.float32).eps
    kind = weight.scheme.fmt.kind
    steps = 0.0 if int8 else blocks.amax(-1) / Q_MAX[kind] / 2 @ weights.T
    if kind == "codebook":
        fixed = weight.scheme.fmt.levels
        levels = torch.tensor(fixed) if weight.levels is None else weight.levels
        assert weight.scales is not None
        largest = weight.scales.double().abs() * levels.double().abs().amax(-1, keepdim=True)
        largest = largest.expand(len(real), -1)
        by_column = largest.repeat_interleave(k // largest.shape[1], dim=1)
        steps = steps + 2.0**-14 * x.abs() @ by_column.T
    return steps + 4 * eps * x.abs() @ real.abs().T + summing_bound(x, weight)


def summing_bound(x, weight: QTensor) -> torch.Tensor:
    """2 K eps of what float32 adds up when codes of `weight` are multiplied by x. x: (..., K).

    Stored integer codes are unsigned, so their products and the sum of x that is taken off again
    are larger than the result: scale * offset * |x|. Other codes: |weight| |x|.
    """
    if weight.scheme.fmt.kind == "integer":
        n, k = weight.shape
        assert weight.scales is not None
        scale = weight.scales.double().abs().expand(n, -1)
        offset = 2.0 ** (weight.scheme.fmt.bits - 1)
        if weight.zero_point is not None:
            offset = offset + weight.zero_point.double().abs().expand_as(scale)
        terms = (scale * offset).repeat_interleave(k // scale.shape[1], dim=1)
    else:
        terms = _values(weight).abs()
    return 2 * weight.shape[1] * torch.finfo(torch.float32).eps * x.double().abs() @ terms.T


def assert_embedding(y, indices, weight: QTensor, dtype: torch.dtype) -> None:
    """y = weight[indices] to the rounding of float32 and of `dtype`. y: (..., K)."""
    expected = _values(weight)[indices]
    limits = torch.finfo(dtype)
    bound = (limits.eps / 2 + 2 * UNIT_ROUNDOFF) * expected.abs()
    bound = bound + limits.smallest_normal * limits.eps
    assert y.dtype == dtype, f"{y.dtype}, not {dtype}"
    _assert_below((y.double() - expected).abs(), bound, "rounding")


@lru_cache(maxsize=32)
def _values(weight: QTensor) -> torch.Tensor:
    """The oracle's weight, (N, K) float64; kept, because one weight is checked many times."""
    return weight_values(weight)


def _magnitude(bias) -> torch.Tensor | float:
    return 0.0 if bias is None else bias.double().abs()


def _assert_below(distance: torch.Tensor, bound: torch.Tensor, what: str) -> None:
    assert distance.shape == bound.shape, f"shape {tuple(distance.shape)}, not {tuple(bound.shape)}"
    wrong = ~(distance <= bound)  # NaN is wrong
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are further than {what}; the first at {at}: "
            f"{distance[at].item():.6g} > {bound[at].item():.6g}"
        )


def corruptions(y: torch.Tensor, y_scale_lost: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checker must reject. y: (rows, ...); y_scale_lost: y without one group's scale."""
    yield "output x 2", y * 2
    yield "sign flipped", -y
    yield "two rows swapped", y[[1, 0, *range(2, len(y))]]
    yield "one group's scale lost", y_scale_lost


# --- the native library ---------------------------------------------------------------------------


def instruction_sets() -> list[Any]:
    """Parameters of a test: every instruction set of the library; those that do not work here are
    skipped with the reason.
    """
    reason = native.why_not()
    if reason is not None:
        return [pytest.param("none", marks=pytest.mark.skip(reason=reason))]
    return [
        pytest.param(name, marks=[] if why is None else pytest.mark.skip(reason=why))
        for name, why in native.instruction_sets().items()
    ]


@contextmanager
def instruction_set(name: str) -> Iterator[str]:
    """Native kernels use this one inside."""
    before = native.instruction_set()
    native.use_instruction_set(name)
    try:
        yield name
    finally:
        native.use_instruction_set(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch, and native kernels with it, use this many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- other processes ------------------------------------------------------------------------------

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.helpers"])  # torch is imported once
SECONDS = 120  # how long a child may say nothing before it counts as hanging, on a busy machine


def in_child(function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> Any:
    """What function(step, *arguments) returns in a process of its own.

    AssertionError when the process dies, raises or hangs, with what it last passed to `step`.
    """
    receiver, sender = PROCESSES.Pipe(duplex=False)
    child = PROCESSES.Process(target=_child, args=(sender, function, arguments))
    child.start()
    sender.close()
    step = "nothing yet"
    try:
        while True:
            if not receiver.poll(seconds):
                raise AssertionError(f"the process hangs after: {step}")
            kind, value = receiver.recv()
            if kind == "returned":
                return value
            if kind == "raised":
                raise AssertionError(f"the process failed after: {step}\n{value}")
            step = value
    except EOFError:
        child.join(seconds)
        raise AssertionError(f"the process died ({child.exitcode}) after: {step}") from None
    finally:
        child.kill()
        child.join(seconds)
        child.close()
        receiver.close()


def _child(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        message = ("returned", function(lambda step: sender.send(("step", step)), *arguments))
    except BaseException:
        message = ("raised", traceback.format_exc())
    sender.send(message)
    sender.close()


def with_environment(step, variables: dict[str, str], function, *arguments) -> Any:
    """For `in_child`: function(*arguments) where these environment variables were set before the
    native library was looked for.
    """
    os.environ.update(variables)
    native._load.cache_clear()
    return function(*arguments)
