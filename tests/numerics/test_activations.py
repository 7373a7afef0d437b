import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import PROPERTY
from zeropoint.kernels import reference
from zeropoint.numerics.activations import Q_MAX, round_tokens

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
