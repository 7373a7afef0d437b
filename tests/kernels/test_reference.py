"""The oracle itself, against Python integers and fractions: no tensor arithmetic shared with it."""

from fractions import Fraction

import pytest
import torch

from tests.helpers import SUBNORMAL, UNIT_ROUNDOFF, example_weight, rtn, schemes
from zeropoint.kernels import reference
from zeropoint.kernels.spec import Spec
from zeropoint.numerics import e8p

scaled = [s for s in schemes() if s.fmt.kind != "downcast"]
every_scheme = pytest.mark.parametrize("scheme", schemes(), ids=str)


def exact_value(weight, row, column):
    """real = scale * (code - zero_point) of one weight, as a fraction."""
    scheme, fmt = weight.scheme, weight.scheme.fmt
    n, k = weight.shape
    row_bytes = len(weight.packed) // n
    stored = bytes(weight.packed[row * row_bytes : (row + 1) * row_bytes].tolist())
    code = (int.from_bytes(stored, "little") >> (column * fmt.bits)) % 2**fmt.bits
    at = {
        "tensor": (0, 0),
        "channel": (row, 0),
        "group": (row, column // (scheme.group_size or 1)),
    }[scheme.granularity]
    scale = Fraction(weight.scales[at].item())
    if weight.levels is not None:
        own = weight.levels[row if len(weight.levels) > 1 else 0]
        return scale * Fraction(own[code].item())
    if fmt.kind == "vector":
        return scale * exact_entry(
            int.from_bytes(stored, "little") >> (column // 8 * 16), column % 8
        )
    if fmt.kind == "codebook":
        return scale * Fraction(fmt.levels[code])
    if fmt.kind == "float8":
        return scale * Fraction(torch.tensor(code, dtype=torch.uint8).view(fmt.dtype).item())
    zero_point = 0 if weight.zero_point is None else weight.zero_point[at].item()
    return scale * (code + fmt.q_min - zero_point)


def exact_entry(word, i):
    """Value i of the codeword that the low 16 bits of an integer are."""
    pattern = [Fraction(2 * whole + 1, 2) for whole in e8p.wholes()[word % 256].tolist()]
    negative = [word >> (8 + j) & 1 for j in range(7)]
    values = [-p if sign else p for p, sign in zip(pattern, [*negative, 0], strict=True)]
    if sum(values) % 2:
        values[7] = -values[7]
    return values[i] + (Fraction(1, 4) if word >> 15 & 1 else Fraction(-1, 4))


@pytest.mark.parametrize("scheme", scaled, ids=str)
def test_weight_values_follow_the_formula_one_by_one(scheme):
    weight = rtn(example_weight(3, 64), scheme)
    values = reference.weight_values(weight)
    assert values.dtype == torch.float64 and values.shape == (3, 64)
    for row in range(3):
        for column in range(64):
            expected = exact_value(weight, row, column)
            # Exact, but for nf4, whose levels are float64 numbers of full length.
            assert values[row, column].item() == pytest.approx(float(expected), rel=2.0**-52, abs=0)


@every_scheme
def test_weight_values_equal_dequantize_to_float32_rounding(scheme):
    weight = rtn(example_weight(), scheme)
    values = reference.weight_values(weight)
    difference = (weight.dequantize(torch.float32).double() - values).abs()
    # The level of a codebook and the product are each rounded once to float32. A zero of iq4nl is
    # the least scale times 1/127, a subnormal.
    assert (difference <= 2 * UNIT_ROUNDOFF * values.abs() + SUBNORMAL).all()


@every_scheme
def test_linear_is_the_sum_of_products_in_float64(scheme):
    weight = rtn(example_weight(4, 64), scheme)
    x = torch.tensor([[0.5] * 64, [0.0] * 63 + [-2.0]])
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0])
    values = reference.weight_values(weight)
    expected = torch.stack([0.5 * values.sum(1), -2.0 * values[:, -1]])
    # torch sums in another order: 64 additions of float64 on values below 50.
    assert torch.allclose(reference.linear(x.double(), weight, None), expected, rtol=0, atol=1e-11)
    with_bias = reference.linear(x, weight, bias)
    assert with_bias.dtype == torch.float32
    assert torch.allclose(with_bias, (expected + bias).float(), rtol=2 * UNIT_ROUNDOFF, atol=1e-11)


@every_scheme
def test_embedding_takes_rows(scheme):
    weight = rtn(example_weight(4, 64), scheme)
    rows = reference.embedding(torch.tensor([[3, 0]]), weight, torch.bfloat16)
    expected = reference.weight_values(weight)[[3, 0]].to(torch.bfloat16)
    assert torch.equal(rows, expected.unsqueeze(0))


@every_scheme
def test_it_is_never_chosen_by_rank_and_says_how_to_force_it(scheme):
    spec = Spec(op="linear", scheme=scheme, shape=(4, 64), device="cpu")
    assert "ZEROPOINT_KERNEL=reference" in reference.why_not(spec)
