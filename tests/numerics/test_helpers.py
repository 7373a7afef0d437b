"""The checkers of `tests/helpers.py` must be able to fail."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch

from tests.helpers import (
    GRIDS,
    assert_embedding,
    assert_linear,
    assert_nearest,
    assert_within_half_step,
    corruptions,
    defaults,
    example_weight,
    rtn,
)
from zeropoint.kernels import reference
from zeropoint.numerics import Grid, dequantize, get_format, quantize

grids = pytest.mark.parametrize(("name", "symmetric"), GRIDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
formats = pytest.mark.parametrize("scheme", defaults(), ids=str)


@contextmanager
def rejected(what):
    try:
        yield
    except AssertionError:
        return
    pytest.fail(f"{what} passed")


def quantized_blocks(name, symmetric):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    q = quantize(weight, name, granularity="group", group_size=16, symmetric=symmetric)
    image = dequantize(*q, name)
    lost = q.scale.clone()
    lost[2, 1] = 0.0
    without = dequantize(q.codes, lost, *q[2:], name)
    return weight.view(4, 4, 16), image.view(4, 4, 16), without.view(4, 4, 16), q


@grids
def test_assert_nearest_rejects_what_is_not_the_image(name, symmetric):
    values, image, without, q = quantized_blocks(name, symmetric)
    fmt = get_format(name)
    assert_nearest(values, image, Grid(*q[1:]), fmt)
    for what, wrong in corruptions(image, without):
        with rejected(what):
            assert_nearest(values, wrong, Grid(*q[1:]), fmt)


@pytest.mark.parametrize(("name", "symmetric"), [g for g in GRIDS if g[0].startswith("int")])
def test_assert_within_half_step_rejects_what_is_not_the_image(name, symmetric):
    values, image, without, q = quantized_blocks(name, symmetric)
    assert_within_half_step(values, image, q.scale)
    for what, wrong in corruptions(image, without):
        with rejected(what):
            assert_within_half_step(values, wrong, q.scale)


def scale_lost(weight):
    """The weight as if one group's scale were 0."""
    if weight.scale is None:
        packed = weight.packed.clone()
        packed[2] = 0
        return dataclasses.replace(weight, packed=packed)
    scale = weight.scales.clone()
    scale[2, 0] = 0
    plain = dataclasses.replace(weight.scheme, double_quant=False)
    return dataclasses.replace(weight, scale=scale, scheme=plain)


@formats
@dtypes
def test_assert_linear_rejects_what_is_not_the_product(scheme, dtype):
    generator = torch.Generator().manual_seed(1)
    weight = rtn(torch.randn(4, 128, generator=generator), scheme)
    x = torch.randn(3, 128, generator=generator).to(dtype)
    bias = torch.randn(4, generator=generator).to(dtype)
    y = reference.linear(x, weight, bias)
    assert_linear(y, x, weight, bias)
    for what, wrong in corruptions(y, reference.linear(x, scale_lost(weight), bias)):
        with rejected(what):
            assert_linear(wrong, x, weight, bias)
    with rejected("bias left out"):
        assert_linear(reference.linear(x, weight, None), x, weight, bias)
    with rejected("another dtype"):
        assert_linear(y.double(), x, weight, bias)


@formats
@dtypes
def test_assert_embedding_rejects_what_is_not_the_rows(scheme, dtype):
    weight = rtn(torch.randn(4, 128, generator=torch.Generator().manual_seed(2)), scheme)
    indices = torch.tensor([3, 2, 0])
    y = reference.embedding(indices, weight, dtype)
    assert_embedding(y, indices, weight, dtype)
    lost = reference.embedding(indices, scale_lost(weight), dtype)
    for what, wrong in corruptions(y, lost):
        with rejected(what):
            assert_embedding(wrong, indices, weight, dtype)


def test_a_nan_and_a_wrong_shape_are_rejected():
    weight = rtn(example_weight(), defaults()[0])
    x = torch.randn(2, 96)
    y = reference.linear(x, weight, None)
    with rejected("NaN"):
        assert_linear(y * float("nan"), x, weight)
    with rejected("a row too few"):
        assert_linear(y[:1], x, weight)
