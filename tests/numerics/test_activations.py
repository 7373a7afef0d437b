import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import PROPERTY
from zeropoint.errors import ScaleRangeError
from zeropoint.kernels import reference
from zeropoint.numerics.activations import (
    Q_MAX,
    round_but_outliers,
    round_static,
    round_tokens,
    static_parameters,
)
from zeropoint.numerics.formats import FORMATS

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_dtype
def test_a_token_is_rounded_to_127_steps_of_its_own_largest_value(dtype):
    x = noise(3, 4, 33).to(dtype)
    x[1] *= 100
    rounded = round_tokens(x)
    assert rounded.shape == x.shape and rounded.dtype == dtype
    step = x.double().abs().amax(-1, keepdim=True) / Q_MAX
    eps = torch.finfo(dtype).eps
    # Half a step; the quotient, the scale and the product are rounded, then the result.
    assert ((rounded - x).double().abs() <= step / 2 + 2 * eps * x.double().abs()).all()
    codes = rounded.double() / step
    assert ((codes - codes.round()).abs() <= 2 * eps * codes.abs()).all()
    assert codes.abs().amax(-1).allclose(torch.tensor(127.0).double(), rtol=2 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_what_the_oracle_multiplies(dtype):
    x = noise(40, 100).to(dtype)
    x[1] = 0
    x[2] *= 1e-40
    x[3] *= 1e4
    assert torch.equal(round_tokens(x), reference._int8_tokens(x).to(dtype))


@PROPERTY
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_values_keep_their_sign_and_their_order(values):
    x = torch.tensor(values).sort().values
    rounded = round_tokens(x)
    assert (rounded * x >= 0).all()
    assert (rounded.diff() >= 0).all()


@PROPERTY
@given(st.integers(-40, 37), st.lists(st.integers(-127, 127), min_size=1))
def test_values_on_the_grid_stay(exponent, codes):
    x = torch.tensor([127.0, *codes]) * 2.0**exponent
    assert torch.equal(round_tokens(x), x)


@every_dtype
def test_a_zero_token_stays_zero_and_minus_zero_becomes_zero(dtype):
    x = torch.tensor([[0.0, -0.0], [1.0, -0.0], [-1.0, -1e-4]]).to(dtype)
    rounded = round_tokens(x)
    assert rounded.tolist() == [[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]
    assert not rounded[:, 1].signbit().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_token_that_is_not_finite_becomes_nan_and_leaves_the_others(value, gradient):
    x = noise(3, 5)
    expected = round_tokens(x)
    x[1, 2] = value
    rounded = round_tokens(x.requires_grad_(gradient)).detach()
    assert rounded[1].isnan().all()
    assert torch.equal(rounded[[0, 2]], expected[[0, 2]])


def test_no_token_and_no_column():
    assert round_tokens(torch.ones(0, 4)).shape == (0, 4)
    assert round_tokens(torch.ones(2, 1)).tolist() == [[1.0], [1.0]]


@every_dtype
def test_the_gradient_passes_straight_through_and_changes_no_value(dtype):
    x = noise(5, 33).to(dtype)
    expected = round_tokens(x)
    rounded = round_tokens(x.requires_grad_())
    assert torch.equal(rounded, expected)
    upstream = noise(5, 33, seed=1).to(dtype)
    rounded.backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_the_argument_is_not_changed():
    x = noise(2, 9)
    before = x.clone()
    round_tokens(x)
    assert torch.equal(x, before)


# --- float8, token by token -----------------------------------------------------------------------

FLOAT8 = ["float8_e4m3fn", "float8_e5m2"]
every_float8 = pytest.mark.parametrize("format", FLOAT8)
every_format = pytest.mark.parametrize("format", ["int8", *FLOAT8])


@every_float8
@every_dtype
def test_a_float8_token_is_rounded_to_the_nearest_float8_of_its_own_scale(format, dtype):
    x = noise(3, 4, 33).to(dtype)
    x[1] *= 100
    rounded = round_tokens(x, format)
    assert rounded.shape == x.shape and rounded.dtype == dtype
    fmt = FORMATS[format]
    points = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).double()
    scale = x.double().abs().amax(-1, keepdim=True) / fmt.real_max
    grid = scale.unsqueeze(-1) * points[points.isfinite()]
    nearest = (x.double().unsqueeze(-1) - grid).abs().amin(-1)
    slack = 4 * torch.finfo(dtype).eps * x.double().abs()
    assert ((rounded - x).double().abs() <= nearest + slack).all()


@every_format
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_becomes_nan_in_every_format(value, format):
    x = noise(3, 5)
    expected = round_tokens(x, format)
    x[1, 2] = value
    rounded = round_tokens(x, format)
    assert rounded[1].isnan().all() and torch.equal(rounded[[0, 2]], expected[[0, 2]])


@every_float8
@pytest.mark.parametrize("largest", [3e38, 1e-38, 1e-42, 1e-45, 0.0])
def test_float8_tokens_of_any_size_stay_finite(format, largest):
    rounded = round_tokens(torch.tensor([largest, -largest, largest / 3]), format)
    assert rounded.isfinite().all() and rounded.abs().max() <= 1.001 * largest


# --- static ---------------------------------------------------------------------------------------


@every_format
@every_dtype
def test_a_static_range_rounds_to_the_nearest_code_and_saturates(format, dtype):
    fmt = FORMATS[format]
    low, high = -0.3, 2.0
    scale, zero_point = static_parameters(low, high, format)
    x = noise(7, 11).mul(2).to(dtype)
    rounded = round_static(x, scale, zero_point, format)
    assert rounded.shape == x.shape and rounded.dtype == dtype
    if format == "int8":
        codes = torch.arange(-128, 128, dtype=torch.float64) - zero_point.double()
    else:
        assert zero_point is None
        codes = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).double()
    grid = scale.double() * codes[codes.isfinite()]
    nearest = (x.double().unsqueeze(-1) - grid).abs().amin(-1)
    slack = 4 * torch.finfo(dtype).eps * (x.double().abs() + high)
    assert ((rounded - x).double().abs() <= nearest + slack).all()
    assert (x > 2.1).any() and rounded.max() <= high * 1.01


@PROPERTY
@given(
    st.floats(-1e30, 1e30),
    st.floats(-1e30, 1e30),
    st.lists(st.floats(0, 1), min_size=1, max_size=20),
)
def test_inside_a_static_range_nothing_moves_by_more_than_half_a_step(a, b, shares):
    low, high = min(a, b), max(a, b)
    scale, zero_point = static_parameters(low, high, "int8")
    x = torch.tensor([low + s * (high - low) for s in shares])
    rounded = round_static(x, scale, zero_point)
    # The zero point is rounded, so either end may be half a step outside of the codes.
    step = scale.double()
    slack = 4 * torch.finfo(torch.float32).eps * (x.double().abs() + 256 * step)
    assert ((rounded.double() - x.double()).abs() <= step + slack).all()
    middle = (x.double() > low + step) & (x.double() < high - step)
    assert ((rounded.double() - x.double()).abs() <= step / 2 + slack)[middle].all()
    assert torch.equal(round_static(rounded, scale, zero_point), rounded), "on the grid"
    assert round_static(torch.zeros(1), scale, zero_point).item() == 0.0


def test_a_one_sided_range_has_all_its_codes_on_that_side():
    x = torch.linspace(0, 1, 1001)
    one_sided = round_static(x, *static_parameters(0.0, 1.0, "int8"))
    symmetric = round_static(x, *static_parameters(-1.0, 1.0, "int8"))
    assert len(one_sided.unique()) == 256 and len(symmetric.unique()) < 130
    assert (one_sided - x).abs().max() < 0.51 * (symmetric - x).abs().max()


@every_format
def test_the_parameters_of_ranges_without_width_or_beyond_float32(format):
    scale, zero_point = static_parameters(0.0, 0.0, format)
    assert scale.item() == 1.0 and scale.dtype == torch.float32 and scale.shape == ()
    assert zero_point is None if format != "int8" else zero_point.dtype == torch.int8
    assert round_static(torch.zeros(2), scale, zero_point, format).tolist() == [0.0, 0.0]
    with pytest.raises(ScaleRangeError, match="does not fit float32"):
        static_parameters(-1e50, 1e50, format)


@every_format
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_not_finite_does_not_saturate(value, gradient, format):
    x = torch.tensor([0.5, value]).requires_grad_(gradient)
    rounded = round_static(x, *static_parameters(-1.0, 1.0, format), format)
    assert rounded[0].isfinite() and rounded[1].isnan()


# --- outliers -------------------------------------------------------------------------------------


def with_outliers(dtype=torch.float32):
    x = noise(2, 5, 48).clamp(-4, 4)
    x[0, 1, 3], x[1, 4, 3], x[1, 0, 7] = 60.0, -9.0, 6.0
    return x.to(dtype)


@every_dtype
def test_columns_with_an_outlier_stay_bit_by_bit_and_the_others_are_int8(dtype):
    x = with_outliers(dtype)
    rounded = round_but_outliers(x, 6.0)
    kept = [3, 7]
    rest = [i for i in range(48) if i not in kept]
    assert torch.equal(rounded[..., kept], x[..., kept])
    below = torch.where(x.abs() >= 6, 0, x)  # what is below the threshold has a say in the scale
    assert torch.equal(rounded[..., rest], round_tokens(below)[..., rest])


def test_without_outliers_it_is_plain_int8_and_a_single_vector_is_one_token():
    x = noise(3, 9)
    assert torch.equal(round_but_outliers(x, 100.0), round_tokens(x))
    assert torch.equal(round_but_outliers(x[0], 100.0), round_tokens(x[0]))
    assert torch.equal(round_but_outliers(x[:1], 0.5)[0], round_but_outliers(x[0], 0.5))
    assert torch.equal(round_but_outliers(x, 1e-9), x)
    assert round_but_outliers(x[:0], 1.0).shape == (0, 9)


def test_planted_outliers_ruin_plain_int8_and_not_this():
    x = with_outliers()
    plain, kept = round_tokens(x), round_but_outliers(x, 6.0)
    token = (0, 1)  # the one with 60
    assert (plain - x)[token].abs().max() > 0.2 > 0.02 > (kept - x)[token].abs().max()


def test_an_infinite_outlier_stays_and_a_nan_spoils_its_token():
    x = noise(3, 5)
    x[0, 1], x[2, 2] = torch.inf, torch.nan
    rounded = round_but_outliers(x, 6.0)
    assert rounded[0].isfinite().tolist() == [True, False, True, True, True]
    assert rounded[0, 1] == torch.inf and rounded[1].isfinite().all()
    assert rounded[2, [0, 2, 3, 4]].isnan().all() and rounded[2, 1] == x[2, 1]


# --- all of them ----------------------------------------------------------------------------------

ROUNDINGS = {
    "tokens": lambda x: round_tokens(x),
    "float8 tokens": lambda x: round_tokens(x, "float8_e4m3fn"),
    "static": lambda x: round_static(x, *static_parameters(-0.4, 1.5, "int8")),
    "float8 static": lambda x: round_static(
        x, *static_parameters(-0.4, 1.5, "float8_e5m2"), "float8_e5m2"
    ),
    "outliers": lambda x: round_but_outliers(x, 1.5),
}


@pytest.mark.parametrize("kind", ROUNDINGS)
@every_dtype
def test_every_rounding_passes_the_gradient_and_leaves_its_argument(kind, dtype):
    function = ROUNDINGS[kind]
    x = noise(5, 33).to(dtype)
    before = x.clone()
    expected = function(x)
    assert torch.equal(x, before) and expected.dtype == dtype
    rounded = function(x.requires_grad_())
    assert torch.equal(rounded, expected)
    upstream = noise(5, 33, seed=1).to(dtype)
    rounded.backward(upstream)
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("kind", ROUNDINGS)
def test_every_rounding_takes_no_token_and_has_no_minus_zero(kind):
    function = ROUNDINGS[kind]
    assert function(torch.ones(0, 4)).shape == (0, 4)
    if kind != "outliers":  # where a column of outliers keeps every bit
        rounded = function(torch.tensor([[-0.0, 1.0], [0.0, -1e-7]]))
        assert not (rounded.signbit() & (rounded == 0)).any()
