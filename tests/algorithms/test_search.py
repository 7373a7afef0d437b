"""Scale search: never worse than rounding in its own norm, and as good as theory says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import PROPERTY, SCALED, example_weight, schemes
from zeropoint.algorithms.rtn import rtn
from zeropoint.algorithms.search import search
from zeropoint.errors import NonFiniteError
from zeropoint.scheme import Scheme


def loss(q, weight, importance=None):
    squares = (q.dequantize(torch.float32) - weight).double().square()
    return float((squares if importance is None else squares * importance).sum())


@pytest.mark.parametrize("scheme", [s for s in schemes() if not s.double_quant], ids=str)
def test_it_never_loses_more_than_rounding_to_nearest(scheme):
    weight = example_weight()
    assert loss(search(weight, scheme), weight) <= loss(rtn(weight, scheme), weight)


@pytest.mark.parametrize("fmt", SCALED, ids=lambda f: f.name)
@PROPERTY
@given(seed=st.integers(0, 2**31))
def test_it_never_loses_more_in_a_weighted_norm(fmt, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 64, generator=generator) * 10 ** torch.randn(3, 1, generator=generator)
    importance = torch.rand(64, generator=generator).double().square()
    scheme = Scheme.of(fmt.name, group_size=32)
    found = loss(search(weight, scheme, importance), weight, importance)
    # Columns of least importance count a millionth of the mean, which moves the optimum that far.
    assert found <= loss(rtn(weight, scheme), weight, importance) * (1 + 1e-5) + 1e-12


# Table 5.3 and section 2.12 of the literature survey (iid N(0, 1)), computed independently with
# finer searches; ours may lose at most 3 % to them, and 2 % with a float zero point.
@pytest.mark.parametrize(
    ("name", "group_size", "mse"),
    [
        ("int4", 128, 0.0090),
        ("int3", 128, 0.0347),
        ("int2", 128, 0.135),
        ("iq4nl", 32, 0.00595),
        ("mxfp4", 32, 0.0125),
        ("nvfp4", 16, 0.0073),
    ],
    ids=str,
)
def test_on_a_gaussian_it_reaches_the_known_error(name, group_size, mse):
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.of(name, group_size=group_size)
    assert loss(search(weight, scheme), weight) / weight.numel() < 1.03 * mse


@pytest.mark.parametrize(
    ("name", "group_size", "mse"),
    [("int4", 128, 0.0093), ("int4", 32, 0.0066), ("int3", 128, 0.0347)],
)
def test_a_scale_of_either_sign_reaches_the_known_error_of_a_full_range(name, group_size, mse):
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    found = search(weight, Scheme.of(name, group_size=group_size, symmetric=True))
    assert loss(found, weight) / weight.numel() < 1.02 * mse
    negative = (found.scale < 0).float().mean()
    assert 0.4 < negative < 0.6, "the largest value is above 0 as often as below"


def test_a_scale_of_either_sign_makes_a_weight_and_its_negative_alike():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.of("int3", group_size=32, symmetric=True)
    one, other = search(weight, scheme), search(-weight, scheme)
    torch.testing.assert_close(loss(one, weight), loss(other, -weight), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "group_size", "mse"),
    [("int4", 32, 0.0049), ("int3", 32, 0.0219), ("int2", 32, 0.099), ("int2", 128, 0.110)],
    ids=str,
)
def test_a_float_zero_point_reaches_the_known_error_of_a_stored_minimum(name, group_size, mse):
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.of(name, group_size=group_size, float_zero_point=True)
    found = loss(search(weight, scheme), weight) / weight.numel()
    assert found < 1.02 * mse
    integer = Scheme.of(name, group_size=group_size)
    assert found < 0.9 * loss(search(weight, integer), weight) / weight.numel()


def test_a_float_zero_point_does_not_care_where_zero_is():
    """Values around 50 are stored as well as those around 0, but for rounding z to 1/32."""
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.of("int3", group_size=32, float_zero_point=True)
    near, far = (loss(search(w, scheme), w) for w in (weight, weight + 50))
    assert far < 1.02 * near
    integer = Scheme.of("int3", group_size=32)
    assert loss(search(weight + 50, integer), weight + 50) > 40 * far  # it spends its codes on 0


def test_levels_and_scales_in_turn_beat_a_fixed_table_and_levels_alone():
    """Lloyd-Max with 16 levels loses .0095 of a Gaussian; a scale for 64 values wins on that."""
    weight = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    found, alone, table = (
        loss(f(weight, Scheme.of(name)), weight) / weight.numel()
        for f, name in ((search, "any4"), (rtn, "any4"), (search, "nf4"))
    )
    assert found < 0.96 * alone and found < 0.95 * table and found < 0.0095


def test_levels_follow_the_columns_that_count():
    """Every other column has large inputs and small weights: most levels are for these."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 512, generator=generator)
    weight[:, ::2] *= 0.05
    importance = torch.ones(512, dtype=torch.float64)
    importance[::2] = 1e3
    scheme = Scheme.of("any4", group_size=-1)
    found, blind = search(weight, scheme, importance), search(weight, scheme)
    assert loss(found, weight, importance) < 0.2 * loss(blind, weight, importance)


@pytest.mark.parametrize("scheme", schemes(), ids=str)
def test_scales_are_positive_and_zero_points_are_codes_or_finite_floats(scheme):
    q = search(example_weight(), scheme, torch.linspace(0, 1, 96))
    if q.scale is not None:
        scale = q.scale.float()
        signed = scheme.symmetric and scheme.fmt.signed_scale
        assert ((scale > 0) | (signed & (scale < 0))).all() and scale.isfinite().all()
    if scheme.float_zero_point:
        assert q.zero_point.dtype == torch.float16 and q.zero_point.isfinite().all()
    elif q.zero_point is not None:
        assert q.zero_point.min() >= scheme.fmt.q_min and q.zero_point.max() <= scheme.fmt.q_max


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme.of("int4"),
        Scheme.of("int3", symmetric=True),
        Scheme.of("int2", float_zero_point=True),
    ],
    ids=str,
)
def test_a_weight_times_a_power_of_two_has_the_same_codes(scheme):
    weight = example_weight()
    one, four = search(weight, scheme), search(4 * weight, scheme)
    assert torch.equal(one.codes, four.codes)
    assert torch.equal(4 * one.dequantize(), four.dequantize())


def test_only_what_counts_is_fitted():
    """An outlier in a column that no input uses does not widen the grid."""
    weight = example_weight(k=64)[3:4].clone()
    weight[0, 5] = 30.0
    importance = torch.ones(64)
    importance[5] = 0.0
    scheme = Scheme.of("int4", group_size=-1)
    blind, seeing = search(weight, scheme), search(weight, scheme, importance)
    assert loss(seeing, weight, importance) < loss(blind, weight, importance) / 3
    assert seeing.scale < blind.scale / 2


def test_importance_of_nothing_counts_all_columns_alike():
    weight, scheme = example_weight(), Scheme.of("int4")
    found = search(weight, scheme, torch.zeros(96))
    assert torch.equal(found.codes, search(weight, scheme).codes)


def test_a_weight_that_is_not_finite_is_refused():
    weight = example_weight()
    weight[1, 2] = float("inf")
    with pytest.raises(NonFiniteError, match="0 NaN and 1 Inf"):
        search(weight, Scheme.of("int4"))
