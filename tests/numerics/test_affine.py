import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.helpers import INTEGERS, PROPERTY, UNIT_ROUNDOFF, assert_within_half_step
from zeropoint.errors import ScaleRangeError
from zeropoint.numerics.affine import (
    FURTHEST_ZERO,
    SCALE_FLOOR,
    affine_codes,
    affine_parameters,
    affine_values,
    asymmetric_parameters,
    float_zero_parameters,
    round_scale_up,
    symmetric_scale,
)
from zeropoint.numerics.formats import SCALE_DTYPES

integers = pytest.mark.parametrize("fmt", INTEGERS, ids=lambda f: f.name)
DTYPES = st.sampled_from(list(SCALE_DTYPES.values()))

# Up to 2^14 every scale fits float16, subnormals included in what may come.
BLOCKS = st.lists(
    st.floats(-(2.0**14), 2.0**14, width=32, allow_nan=False), min_size=1, max_size=12
)


def block(values):
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1)


def below(scale: torch.Tensor) -> torch.Tensor:
    """The next smaller number of the same dtype, for positive numbers."""
    bits = torch.int32 if scale.dtype == torch.float32 else torch.int16
    return (scale.view(bits) - 1).view(scale.dtype)


@pytest.mark.parametrize("dtype", SCALE_DTYPES.values(), ids=SCALE_DTYPES)
@PROPERTY
@given(exact=st.floats(0, 65504.0))
@example(exact=0.0)
@example(exact=5e-324)
@example(
    exact=1 + 2.0**-40
)  # just above a number of every dtype: rounding to nearest would go down
@example(exact=2.0**-24 * 1.5)
def test_a_stored_scale_is_the_smallest_that_is_not_below_the_exact_one(dtype, exact):
    stored = round_scale_up(torch.tensor([exact], dtype=torch.float64), dtype)
    assert stored.dtype == dtype
    assert stored.double().item() >= exact
    floor = SCALE_FLOOR[dtype]
    assert stored.double().item() >= floor
    assert below(stored).double().item() < max(exact, floor)


@pytest.mark.parametrize(
    ("dtype", "scale", "message"),
    [
        (
            torch.float16,
            7e4,
            r"a scale of 70000 does not fit float16, whose largest value is 65504",
        ),
        (
            torch.bfloat16,
            3.4e38,
            r"3.4e\+38 does not fit bfloat16, whose largest value is 3.38953e\+38",
        ),
        (
            torch.float32,
            1e39,
            r"a scale of 1e\+39 does not fit float32, whose largest value is 3.40282e\+38",
        ),
    ],
)
def test_a_scale_that_does_not_fit_names_the_value_and_the_limit(dtype, scale, message):
    with pytest.raises(ScaleRangeError, match=message):
        round_scale_up(torch.tensor([1.0, scale], dtype=torch.float64), dtype)


def test_a_scale_that_does_not_fit_16_bits_is_told_to_use_float32():
    with pytest.raises(ScaleRangeError, match="use scale_dtype='float32'"):
        round_scale_up(torch.tensor([7e4]), torch.float16)


@integers
@PROPERTY
@given(dtype=DTYPES, values=BLOCKS)
def test_parameters_put_zero_on_a_code_and_cover_the_range(fmt, dtype, values):
    blocks = block(values)
    r_min, r_max = blocks.amin(-1), blocks.amax(-1)
    scale, zero_point = affine_parameters(r_min, r_max, fmt, dtype)
    assert scale.dtype == dtype and zero_point.dtype == torch.int8
    z = zero_point.item()
    assert fmt.q_min <= z <= fmt.q_max
    s = scale.double().item()
    low, high = min(0.0, r_min.double().item()), max(0.0, r_max.double().item())
    assert s * (fmt.q_max - fmt.q_min) >= (high - low) * (1 - 2.0**-52)
    # Rounding z moves the grid by half a step at most; 2^-40 is for this test's own sums.
    assert s * (fmt.q_min - z) <= low + s * (0.5 + 2.0**-40)
    assert s * (fmt.q_max - z) >= high - s * (0.5 + 2.0**-40)


@integers
@PROPERTY
@given(dtype=DTYPES, values=BLOCKS)
def test_asymmetric_codes_stay_in_range_keep_zero_and_err_by_half_a_step(fmt, dtype, values):
    blocks = torch.cat([block(values), torch.zeros(1, 1, 1)], dim=-1)
    scale, zero_point = asymmetric_parameters(blocks, fmt, dtype)
    codes = affine_codes(blocks, scale, zero_point, fmt)
    image = affine_values(codes, scale, zero_point)
    assert codes.dtype == torch.int8
    assert codes.min() >= fmt.q_min and codes.max() <= fmt.q_max
    assert codes[0, 0, -1] == zero_point and image[0, 0, -1] == 0
    assert_within_half_step(blocks, image, scale)


@integers
@PROPERTY
@given(dtype=DTYPES, values=BLOCKS)
@example(dtype=torch.float16, values=[1000.0, 1000.5, 1001.0])
@example(dtype=torch.float32, values=[-1e-20, -1.0000001e-20])
def test_a_float_zero_point_keeps_the_error_below_half_a_step(fmt, dtype, values):
    blocks = block(values)
    scale, zero_point = float_zero_parameters(blocks, fmt, dtype)
    assert scale.dtype == dtype and zero_point.dtype == torch.float16
    assert zero_point.abs().item() <= FURTHEST_ZERO
    codes = affine_codes(blocks, scale, zero_point, fmt)
    assert codes.min() >= fmt.q_min and codes.max() <= fmt.q_max
    image = affine_values(codes, scale, zero_point)
    # The quotient and its sum with the zero point are rounded to float32.
    slack = 4 * UNIT_ROUNDOFF * (blocks.abs().double() + scale.double() * FURTHEST_ZERO)
    assert ((blocks - image).abs().double() <= scale.double() / 2 + slack).all()
    assert torch.equal(affine_codes(image, scale, zero_point, fmt), codes)


@integers
def test_a_float_zero_point_spans_the_values_alone(fmt):
    """The range is not widened to contain 0, so the step is the smallest that there is."""
    blocks = torch.rand(4, 3, 64, generator=torch.Generator().manual_seed(0)) + 2
    scale, zero_point = float_zero_parameters(blocks, fmt, torch.float32)
    step = (blocks.amax(-1) - blocks.amin(-1)) / (fmt.q_max - fmt.q_min)
    torch.testing.assert_close(scale, step)
    assert (zero_point < fmt.q_min).all(), "0 is not on the grid"
    codes = affine_codes(blocks, scale, zero_point, fmt)
    assert (codes.amin(-1) == fmt.q_min).all() and (codes.amax(-1) == fmt.q_max).all()


@integers
@PROPERTY
@given(dtype=DTYPES, values=BLOCKS)
def test_symmetric_codes_stay_in_range_keep_zero_and_err_by_half_a_step(fmt, dtype, values):
    blocks = torch.cat([block(values), torch.zeros(1, 1, 1)], dim=-1)
    scale = symmetric_scale(blocks, fmt.reach, dtype)
    codes = affine_codes(blocks, scale, None, fmt)
    image = affine_values(codes, scale, None)
    assert codes.min() >= -fmt.q_max and codes.max() <= fmt.q_max, "q_min is not used"
    assert codes[0, 0, -1] == 0 and image[0, 0, -1] == 0
    assert_within_half_step(blocks, image, scale)


@integers
@pytest.mark.parametrize("dtype", SCALE_DTYPES.values(), ids=SCALE_DTYPES)
def test_the_zero_point_belongs_to_the_stored_scale_not_to_the_exact_one(fmt, dtype):
    """Decision 4: a bfloat16 scale is up to 1/128 larger, which is two steps at code 255."""
    blocks = torch.randn(8, 256, 8, generator=torch.Generator().manual_seed(0))
    scale, zero_point = asymmetric_parameters(blocks, fmt, dtype)
    low = blocks.amin(-1).double().clamp_max(0)
    assert torch.equal(zero_point, torch.round(fmt.q_min - low / scale.double()).to(torch.int8))
    image = affine_values(affine_codes(blocks, scale, zero_point, fmt), scale, zero_point)
    assert_within_half_step(blocks, image, scale)


@integers
@PROPERTY
@given(values=BLOCKS, symmetric=st.booleans())
def test_quantizing_the_image_with_the_stored_parameters_gives_the_same_codes(
    fmt, values, symmetric
):
    blocks, zero_point = block(values), None
    if symmetric:
        scale = symmetric_scale(blocks, fmt.reach, torch.float16)
    else:
        scale, zero_point = asymmetric_parameters(blocks, fmt, torch.float16)
    codes = affine_codes(blocks, scale, zero_point, fmt)
    image = affine_values(codes, scale, zero_point)
    assert torch.equal(affine_codes(image, scale, zero_point, fmt), codes)


@integers
@PROPERTY
@given(values=BLOCKS)
def test_a_symmetric_grid_treats_both_signs_alike(fmt, values):
    blocks = block(values)
    scale = symmetric_scale(blocks, fmt.reach, torch.float16)
    assert torch.equal(symmetric_scale(-blocks, fmt.reach, torch.float16), scale)
    codes = affine_codes(blocks, scale, None, fmt)
    assert torch.equal(affine_codes(-blocks, scale, None, fmt), -codes)


@integers
@pytest.mark.parametrize("magnitude", [3.0, 0.1, 1e-30, 1e30])
def test_a_block_of_one_magnitude_is_exact_with_codes_of_one(fmt, magnitude):
    blocks = block([magnitude, 0.0, -magnitude, magnitude])
    scale = symmetric_scale(blocks, fmt.reach, torch.float32)
    codes = affine_codes(blocks, scale, None, fmt)
    assert codes.flatten().tolist() == [1, 0, -1, 1]
    assert torch.equal(affine_values(codes, scale, None), blocks)


@integers
@pytest.mark.parametrize("constant", [3.0, -0.1, 1e-30, -1e30])
def test_a_constant_block_is_exact_one_step_from_zero(fmt, constant):
    blocks = block([constant] * 3)
    for parameters in (asymmetric_parameters, float_zero_parameters):
        scale, zero_point = parameters(blocks, fmt, torch.float32)
        codes = affine_codes(blocks, scale, zero_point, fmt)
        assert (codes - zero_point).abs().eq(1).all()
        assert torch.equal(affine_values(codes, scale, zero_point), blocks)


@integers
def test_a_zero_block_has_scale_one_and_zero_codes(fmt):
    blocks = torch.zeros(1, 1, 4)
    assert symmetric_scale(blocks, fmt.reach, torch.float16).item() == 1
    for parameters in (asymmetric_parameters, float_zero_parameters):
        scale, zero_point = parameters(blocks, fmt, torch.float16)
        assert scale.item() == 1
        assert (affine_codes(blocks, scale, zero_point, fmt) == zero_point).all()


def test_ties_go_to_the_even_code():
    fmt = INTEGERS[-1]
    codes = affine_codes(block([0.5, 1.5, 2.5, -0.5, -1.5]), torch.ones(1, 1), None, fmt)
    assert codes.flatten().tolist() == [0, 2, 2, 0, -2]


def test_values_beyond_the_grid_are_clamped_to_its_ends():
    fmt = next(f for f in INTEGERS if f.bits == 4)
    codes = affine_codes(block([100.0, -100.0]), torch.ones(1, 1), torch.ones(1, 1), fmt)
    assert codes.flatten().tolist() == [7, -8]


def test_float64_values_are_divided_in_float64():
    # 0.5 + 2^-40 is a tie in float32 (code 0) and not in float64 (code 1).
    blocks = torch.full((1, 1, 1), 0.5 + 2.0**-40, dtype=torch.float64)
    assert affine_codes(blocks, torch.ones(1, 1), None, INTEGERS[-1]).item() == 1


def test_the_formula_is_scale_times_code_minus_zero_point():
    codes = torch.tensor([[[-128, 0, 127]]], dtype=torch.int8)
    zero_point = torch.tensor([[-128]], dtype=torch.int8)
    real = affine_values(codes, torch.tensor([[0.5]], dtype=torch.float16), zero_point)
    assert real.dtype == torch.float32
    assert real.flatten().tolist() == [0.0, 64.0, 127.5]
