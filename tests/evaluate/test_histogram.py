"""What is in a tensor: counts, edges and moments."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

import zeropoint as zp
from tests.helpers import example_weight, rtn
from tests.models import build
from zeropoint.evaluate.histogram import (
    Histogram,
    code_histogram,
    histogram,
    named_tensors,
    summarize,
)
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8])
def test_counts_are_those_of_numpy(dtype: torch.dtype) -> None:
    values = (20 * torch.randn(3, 500, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = histogram(values, bins=16)
    counts, edges = numpy.histogram(values.double().numpy(), bins=16)
    assert sum(found.counts) == values.numel()
    assert numpy.allclose(found.edges, edges)
    # a value on an edge may fall to either side of its rounded position
    assert numpy.abs(counts - numpy.array(found.counts)).sum() <= 2


def test_a_large_tensor_is_counted_in_pieces() -> None:
    values = torch.arange(3 * (1 << 20) + 5) % 4
    assert histogram(values, bins=4).counts == tuple(int((values == i).sum()) for i in range(4))


def test_constant_empty_and_nonfinite() -> None:
    assert histogram(torch.full((4,), 2.0)) == Histogram(edges=(2.0, 2.0), counts=(4,))
    assert histogram(torch.empty(0)) == Histogram(edges=(), counts=())
    values = torch.tensor([math.nan, math.inf, 1.0, 3.0])
    assert histogram(values, bins=2) == Histogram(edges=(1.0, 2.0, 3.0), counts=(1, 1))
    summary = summarize(values)
    assert (summary.nonfinite, summary.mean, summary.std) == (2, 2.0, 1.0)
    empty = summarize(torch.tensor([math.nan]))
    assert (empty.nonfinite, empty.min, empty.max, empty.mean, empty.std) == (1, *[None] * 4)


def test_the_range_may_be_all_that_float64_has() -> None:
    big = torch.finfo(torch.float64).max
    assert histogram(torch.tensor([-big, 0.1, big], dtype=torch.float64), bins=2).counts == (1, 2)


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "nf4"])
def test_codes_have_a_bin_each(name: str) -> None:
    weight = rtn(example_weight(), Scheme.of(name, group_size=32))
    found = code_histogram(weight)
    assert found is not None
    assert len(found.counts) == 1 << weight.scheme.fmt.bits
    for left, right, count in zip(found.edges[:-1], found.edges[1:], found.counts, strict=True):
        assert right == left + 1
        assert count == int((weight.codes.int() == round(left + 0.5)).sum())


@pytest.mark.parametrize("name", ["float8_e4m3fn", "bfloat16"])
def test_codes_that_are_numbers_have_no_histogram_of_their_own(name: str) -> None:
    summary = summarize(rtn(example_weight(), Scheme.of(name)))
    assert summary.codes is None
    assert sum(summary.values.counts) == summary.elements


def test_a_quantized_weight_is_summarized_by_what_it_stands_for() -> None:
    weight = rtn(example_weight(dtype=torch.bfloat16), Scheme.of("int8"))
    summary = summarize(weight)
    real = weight.dequantize(torch.float64)
    assert (summary.min, summary.max) == (float(real.min()), float(real.max()))
    assert summary.mean == pytest.approx(float(real.mean()), rel=1e-6)
    assert summary.std == pytest.approx(float(real.std(correction=0)), rel=1e-6)
    assert (summary.dtype, summary.bytes) == ("bfloat16", weight.nbytes)


def test_tensors_have_all_their_names() -> None:
    model = build("llama-tied")
    assert named_tensors(model).keys() >= model.state_dict().keys()
    zp.quantize(model, "int8")
    zp.freeze(model)
    found = named_tensors(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert isinstance(found[name], QTensor)
    assert isinstance(found["model.embed_tokens.weight_scale"], torch.Tensor)
