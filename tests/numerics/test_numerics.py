"""What `zeropoint.numerics` promises of every format."""

import math
import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers import (
    CODEBOOKS,
    DOWNCASTS,
    GRIDS,
    OF_ONE,
    PROPERTY,
    SCALED,
    UNIT_ROUNDOFF,
    assert_nearest,
    has_units,
)
from zeropoint.errors import NonFiniteError, RecipeError, ScaleRangeError, UnknownNameError
from zeropoint.numerics import (
    FORMATS,
    Grid,
    check_finite,
    dequantize,
    fake_quantize,
    get_format,
    get_scale_dtype,
    quantization_error,
    quantize,
)
from zeropoint.numerics.formats import LEVELS_DTYPE, SCALE_DTYPES

every_format = pytest.mark.parametrize("name", FORMATS)
grids = pytest.mark.parametrize(("name", "symmetric"), GRIDS)
each_value = pytest.mark.parametrize(("name", "symmetric"), OF_ONE)
scale_dtypes = pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)


def image_of(weight, name, **options):
    q = quantize(weight, name, **options)
    return q, dequantize(*q, name)


def check_image(weight, name, q, image):
    """Codes in range, positive scales, zeros exact, every value at the nearest point."""
    fmt = get_format(name)
    if fmt.kind == "integer":
        assert q.codes.dtype == torch.int8
        assert q.codes.min() >= fmt.q_min and q.codes.max() <= fmt.q_max
    elif fmt.kind in ("codebook", "vector"):
        assert q.codes.dtype == torch.uint8 and q.codes.max() < 2**fmt.bits
    assert torch.isfinite(image).all()
    assert not has_units(fmt) or (image[weight == 0] == 0).all()
    assert (q.scale > 0).all() and torch.isfinite(q.scale).all()
    blocks = (*q.scale.shape, -1)
    assert_nearest(weight.reshape(blocks), image.reshape(blocks), Grid(*q[1:]), fmt)


@grids
@PROPERTY
@given(
    values=st.lists(st.floats(-(2.0**14), 2.0**14, width=32), min_size=8, max_size=8),
    scale_dtype=st.sampled_from(list(SCALE_DTYPES)),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
)
def test_every_value_gets_the_nearest_point_of_the_stored_grid(
    name, symmetric, values, scale_dtype, granularity
):
    width = get_format(name).width
    weight = torch.tensor(values).view(2, 4).repeat(1, width)
    q, image = image_of(
        weight,
        name,
        granularity=granularity,
        group_size=2 * width if granularity == "group" else None,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )
    assert q.scale.dtype == SCALE_DTYPES[scale_dtype]
    assert (q.zero_point is None) == symmetric
    check_image(weight, name, q, image)


DEGENERATE = {
    "zero": [0.0, 0.0, 0.0, 0.0],
    "constant": [0.3, 0.3, 0.3, 0.3],
    "negative constant": [-7.0, -7.0, -7.0, -7.0],
    "single outlier": [0.0, 0.0, 1000.0, 0.0],
    "outlier among small": [1e-3, -2e-3, -1000.0, 3e-3],
    "denormal": [1e-40, -2e-41, 3e-42, 1e-45],
    "smallest normal": [2.0**-126, -(2.0**-126), 0.0, 2.0**-127],
    "range without zero": [5.0, 5.1, 5.2, 6.0],
    "negative range without zero": [-5.0, -5.1, -5.2, -6.0],
    "large": [1e37, -3e36, 1.0, 0.0],
}
EXACT = ("zero", "constant", "negative constant")


@grids
@pytest.mark.parametrize("case", DEGENERATE)
def test_a_degenerate_block_is_finite_and_as_near_as_the_grid_allows(name, symmetric, case):
    weight = torch.tensor([DEGENERATE[case]]).repeat(1, get_format(name).width)
    q, image = image_of(weight, name, symmetric=symmetric)
    check_image(weight, name, q, image)
    if not has_units(get_format(name)):
        return
    if case in EXACT or (case == "single outlier" and symmetric):
        assert torch.equal(image, weight)


@each_value
@scale_dtypes
def test_a_constant_is_exact_up_to_its_scales_dtype(name, symmetric, scale_dtype):
    weight = torch.full((1, 4), 0.3)
    _, image = image_of(weight, name, symmetric=symmetric, scale_dtype=scale_dtype)
    # The scale is 0.3 rounded up: at most one unit in the last place.
    eps = torch.finfo(SCALE_DTYPES[scale_dtype]).eps
    # Where 1 is no level: the level and the product are rounded too.
    slack = 0.0 if has_units(get_format(name)) else 2 * UNIT_ROUNDOFF * weight
    if get_format(name).learns_levels:  # close to 1, rounded to float16
        slack = weight * torch.finfo(LEVELS_DTYPE).eps
    assert (image >= weight - slack).all() and (image <= weight + eps * weight + slack).all()


@grids
@scale_dtypes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_near_the_dtypes_largest_are_refused_or_stay_finite(
    name, symmetric, scale_dtype, dtype
):
    """Nothing degrades silently: a finite weight does not become infinite."""
    largest = torch.finfo(dtype).max
    weight = torch.tensor([[1.0, -0.3, 1e-4, 0.0], [1.0, 0.9, -1.0, 1e-4]]) * largest
    weight = weight.repeat(1, get_format(name).width)
    try:
        image = fake_quantize(weight.to(dtype), name, symmetric=symmetric, scale_dtype=scale_dtype)
    except ScaleRangeError:
        return
    assert torch.isfinite(image).all()


@grids
@PROPERTY
@given(
    values=st.lists(
        st.floats(2.0**-20, 2.0**20, width=32)
        | st.floats(-(2.0**20), -(2.0**-20), width=32)
        | st.just(0.0),
        min_size=4,
        max_size=4,
    ),
    exponent=st.integers(-20, 20),
)
def test_scaling_by_a_power_of_two_scales_the_image(name, symmetric, values, exponent):
    weight = torch.tensor([values]).repeat(1, get_format(name).width)
    assume(has_units(get_format(name)) or weight.any())  # else the least scale there is stays it
    _, image = image_of(weight, name, symmetric=symmetric)
    _, scaled = image_of(weight * 2.0**exponent, name, symmetric=symmetric)
    assert torch.equal(scaled, image * 2.0**exponent)


@pytest.mark.parametrize("name", [f.name for f in SCALED if f.name not in ("nf4", "iq4nl", "any4")])
def test_symmetric_grids_treat_both_signs_alike(name):
    """All but nf4 and iq4nl, whose levels are not symmetric, and any4, which may learn others.
    Random values: fp4 sends ties down.
    """
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    _, image = image_of(weight, name)
    _, mirrored = image_of(-weight, name)
    assert torch.equal(mirrored, -image)


@every_format
def test_a_view_of_any_strides_gives_what_its_copy_gives(name):
    base = torch.randn(16, 8, 6, generator=torch.Generator().manual_seed(0))
    views = (
        base.permute(2, 0, 1),
        base[:, ::2],
        base[:, :1].expand(16, 8, 6),
        base.transpose(0, 1),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for view in views:
            q, image = image_of(view, name)
            copy, copy_image = image_of(view.contiguous(), name)
            assert torch.equal(q.codes.float(), copy.codes.float())
            assert torch.equal(image, copy_image) and image.shape == view.shape


@every_format
def test_the_argument_is_left_as_it_was(name):
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    fake_quantize(weight, name)
    assert torch.equal(weight, before)


@every_format
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fake_quantize_is_quantize_then_dequantize_in_the_values_dtype(name, dtype):
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    image = fake_quantize(weight, name)
    assert image.dtype == dtype
    assert torch.equal(image, image_of(weight, name)[1].to(dtype))


@pytest.mark.parametrize("fmt", DOWNCASTS, ids=lambda f: f.name)
def test_a_downcast_is_torchs_own_rounding_without_a_scale(fmt):
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    q, image = image_of(weight, fmt.name)
    assert q.scale is None and q.zero_point is None
    assert torch.equal(q.codes, weight.to(fmt.dtype))
    assert image.dtype == torch.float32 and torch.equal(image, weight.to(fmt.dtype).float())


@pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda f: f.name)
def test_a_codebooks_scale_is_the_least_at_which_its_levels_span_the_block(fmt):
    q = quantize(torch.tensor([[0.25, -3.0], [0.5, 2.0]]), fmt.name)
    below, above = fmt.reach
    expected = torch.tensor([[3 / below], [2 / above]])
    assert torch.allclose(q.scale, expected, rtol=UNIT_ROUNDOFF * 2, atol=0)
    assert below != 1.0 or q.scale[0].item() == 3.0


# --- refusals -------------------------------------------------------------------------------------


@every_format
def test_nan_and_inf_are_refused_with_their_count_and_the_first_position(name):
    weight = torch.ones(3, 4)
    weight[1, 2], weight[2, 0], weight[2, 1] = math.inf, math.nan, -math.inf
    with pytest.raises(
        NonFiniteError, match=r"1 NaN and 2 Inf among 12 values, the first at \[1, 2\]; .*exclude"
    ):
        quantize(weight, name)


def test_finite_values_pass_the_check_and_nan_alone_is_counted():
    check_finite(torch.tensor([3.4e38, -1e-45, 0.0]))
    with pytest.raises(NonFiniteError, match=r"1 NaN and 0 Inf among 1 values, the first at \[0\]"):
        check_finite(torch.tensor([math.nan]))


@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        (torch.ones(2, 2), {"format": "int9"}, UnknownNameError, "'int9' is not a format"),
        (
            torch.ones(2, 2),
            {"scale_dtype": "float61"},
            UnknownNameError,
            "'float61' is not a scale",
        ),
        (torch.ones(2, 2).int(), {}, RecipeError, "values are torch.int32, not floats"),
        (
            torch.ones(2, 2),
            {"format": "nf4", "symmetric": False},
            RecipeError,
            "nf4 has no zero point",
        ),
        (
            torch.ones(2, 2),
            {"float_zero_point": True},
            RecipeError,
            "float_zero_point=True needs symmetric=False: there is no zero point",
        ),
        (torch.ones(2, 0), {}, RecipeError, r"values of shape \(2, 0\) are empty"),
        (torch.ones(2, 2), {"granularity": "row"}, RecipeError, "granularity='row' is not one of"),
        (
            torch.ones(2, 2),
            {"granularity": "group"},
            RecipeError,
            "group_size=None is not a positive",
        ),
        (
            torch.ones(2, 3),
            {"granularity": "group", "group_size": 2},
            RecipeError,
            "K=3 .*group_size=2",
        ),
    ],
)
def test_a_contradiction_is_refused(values, options, error, message):
    with pytest.raises(error, match=message):
        quantize(values, **options)


def test_a_group_size_without_group_granularity_is_not_ignored():
    """Alone it means groups; beside another granularity it is refused, as `Scheme` refuses it."""
    assert quantize(torch.ones(2, 64), "int4", group_size=32).scale.shape == (2, 2)
    with pytest.raises(RecipeError, match="group_size=32 with granularity='channel'"):
        quantize(torch.ones(2, 64), "int4", granularity="channel", group_size=32)


@pytest.mark.parametrize("fmt", SCALED, ids=lambda f: f.name)
def test_dequantize_without_a_scale_says_what_is_missing(fmt):
    q = quantize(torch.ones(2, 8), fmt.name)
    with pytest.raises(RecipeError, match=f"scale is None, but {fmt.name} needs one"):
        dequantize(q.codes, None, format=fmt.name)


def test_dequantize_without_levels_that_were_learned_says_what_is_missing():
    q = quantize(torch.ones(2, 4), "any4")
    with pytest.raises(RecipeError, match="levels is None, but any4 needs them: those that `quant"):
        dequantize(q.codes, q.scale, format="any4")


def test_a_value_too_large_for_a_downcast_names_value_and_limit():
    with pytest.raises(
        ScaleRangeError, match=r"70000 does not fit float16, .* is 65504; use bfloat16"
    ):
        quantize(torch.tensor([[1.0, -7e4]]), "float16")


def test_a_value_too_large_for_bfloat16_is_not_told_to_use_bfloat16():
    largest = torch.finfo(torch.float32).max
    with pytest.raises(ScaleRangeError, match="does not fit bfloat16") as caught:
        quantize(torch.tensor([[largest]]), "bfloat16")
    assert "use bfloat16" not in str(caught.value)


@pytest.mark.parametrize("name", SCALE_DTYPES)
def test_a_scale_dtype_is_found_by_name(name):
    assert get_scale_dtype(name) == getattr(torch, name)


# --- error ----------------------------------------------------------------------------------------


def test_quantization_error_is_in_values_and_decibels():
    error = quantization_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]]))
    assert error == (0.5, 0.125, 20.0)


def test_no_error_is_infinitely_many_decibels_and_noise_on_nothing_none():
    same = quantization_error(torch.ones(3), torch.ones(3))
    assert same == (0.0, 0.0, math.inf)
    assert quantization_error(torch.zeros(3), torch.ones(3)).sqnr_db == -math.inf


def test_quantization_error_is_computed_in_float64():
    value = torch.tensor([1.0], dtype=torch.float64)
    error = quantization_error(value, value + 2.0**-40)
    assert error.max == 2.0**-40


def test_quantization_error_refuses_other_shapes():
    with pytest.raises(RecipeError, match=r"shapes differ: \(2, 1\) and \(1, 2\)"):
        quantization_error(torch.ones(2, 1), torch.ones(1, 2))
