"""HQQ: never worse than rounding in its own norm, and where theory says that nothing moves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import PROPERTY, example_weight, schemes
from zeropoint.algorithms import get_algorithm, hqq
from zeropoint.algorithms.rtn import rtn
from zeropoint.errors import NonFiniteError
from zeropoint.scheme import Scheme

ASYMMETRIC = [s for s in schemes() if not s.symmetric]
INT3 = Scheme.of("int3", group_size=32, float_zero_point=True)


def loss(q, weight):
    """sum |w - image|^p of every block that shares a scale."""
    error = (q.dequantize(torch.float32) - weight).abs().double() ** hqq.NORM
    return error.reshape(*q.scale.shape, -1).sum(-1)


@pytest.mark.parametrize("scheme", ASYMMETRIC, ids=str)
@PROPERTY
@given(seed=st.integers(0, 2**31))
def test_no_block_loses_more_than_rounded_to_nearest(scheme, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 96, generator=generator) * 10 ** torch.randn(3, 1, generator=generator)
    found, rounded = hqq.hqq(weight, scheme), rtn(weight, scheme)
    assert torch.equal(found.scale, rounded.scale)
    # Losses were compared in float32, in units of the scale.
    assert (loss(found, weight) <= loss(rounded, weight) * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ["int4", "int3", "int2"])
def test_a_float_zero_point_is_where_the_gain_is(name):
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    totals = {}
    for floats in (True, False):
        scheme = Scheme.of(name, group_size=64, float_zero_point=floats)
        before = loss(rtn(weight, scheme), weight).sum()
        totals[floats] = float(loss(hqq.hqq(weight, scheme), weight).sum() / before)
    assert totals[True] < 0.97 and totals[True] < totals[False]


def test_with_a_penalty_of_nothing_the_zero_point_stays(monkeypatch):
    """beta -> infinity: the residual is all sparse, and z = mean(q - w / s + r) = z."""
    monkeypatch.setattr(hqq, "BETA", 1e30)
    weight = example_weight()
    found, rounded = hqq.hqq(weight, INT3), rtn(weight, INT3)
    torch.testing.assert_close(found.zero_point, rounded.zero_point, rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize("scheme", [INT3, Scheme.of("int2")], ids=str)
def test_a_weight_times_a_power_of_two_has_the_same_codes(scheme):
    weight = example_weight()
    one, four = hqq.hqq(weight, scheme), hqq.hqq(4 * weight, scheme)
    assert torch.equal(one.codes, four.codes)
    assert torch.equal(4 * one.dequantize(), four.dequantize())


def test_where_there_is_no_zero_point_it_rounds_and_says_so():
    weight, scheme = example_weight(), Scheme.of("int8")
    choice = get_algorithm("hqq").choose(weight, None, scheme)
    assert choice.algorithm == "rtn"
    assert choice.reason == "int8 per channel has no zero point, and hqq moves nothing else"
    assert torch.equal(choice.weight.codes, rtn(weight, scheme).codes)
    assert get_algorithm("hqq").choose(weight, None, INT3).reason is None


def test_a_weight_that_is_not_finite_is_refused():
    weight = example_weight()
    weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="1 NaN and 0 Inf"):
        hqq.hqq(weight, INT3)
