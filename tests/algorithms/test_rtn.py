import math

import pytest
import torch

from tests.helpers import assert_nearest, defaults, example_weight, schemes
from zeropoint.algorithms.rtn import rtn
from zeropoint.errors import GroupSizeError, NonFiniteError, ScaleRangeError
from zeropoint.scheme import Scheme

# Codes are chosen before scales become 8-bit, and blocks of scales span rows.
plain = [s for s in schemes() if not s.double_quant]


@pytest.mark.parametrize("scheme", [s for s in plain if s.fmt.kind != "downcast"], ids=str)
def test_no_code_is_nearer_to_a_weight_than_the_one_chosen(scheme):
    weight = example_weight()
    q = rtn(weight, scheme)
    blocks = (*q.scale.shape, -1)
    image = q.dequantize(torch.float32).view(blocks)
    assert_nearest(weight.view(blocks), image, q.grid, scheme.fmt)


@pytest.mark.parametrize("scheme", schemes(), ids=str)
def test_a_transposed_weight_gives_the_same_bytes(scheme):
    weight = example_weight(n=96, k=64).t()
    found, expected = rtn(weight, scheme), rtn(weight.contiguous(), scheme)
    assert found.parts.keys() == expected.parts.keys()
    for suffix, part in expected.parts.items():
        assert torch.equal(found.parts[suffix], part), suffix


@pytest.mark.parametrize("scheme", [s for s in defaults() if not s.double_quant], ids=str)
def test_rows_are_quantized_independently(scheme):
    weight = example_weight(k=64)
    whole, row = rtn(weight, scheme), rtn(weight[3:4], scheme)
    assert torch.equal(whole.rows(torch.tensor([3])).dequantize(), row.dequantize())


@pytest.mark.parametrize("scheme", defaults(), ids=str)
def test_a_weight_that_is_not_finite_is_refused(scheme):
    weight = example_weight(k=64)
    weight[2, 5] = math.nan
    with pytest.raises(NonFiniteError, match=r"1 NaN and 0 Inf .* the first at \[2, 5\]"):
        rtn(weight, scheme)


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(GroupSizeError, match="K=33 is not a multiple of group_size=32"):
        rtn(torch.ones(2, 33), Scheme.of("int4"))


def test_a_scale_beyond_float16_is_refused():
    with pytest.raises(ScaleRangeError, match="does not fit float16.*use scale_dtype='float32'"):
        rtn(torch.tensor([[1e7, -1.0]]), Scheme.of("int4", group_size=2))


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_magnitude_beyond_float16_is_stored_when_the_grid_can(symmetric):
    """1e5 / 7 fits float16 and 1e5 does not: being exact must not be the reason to refuse."""
    weight = torch.full((1, 32), 1e5)
    q = rtn(weight, Scheme.of("int4", symmetric=symmetric))
    assert torch.allclose(q.dequantize(), weight, rtol=2 * torch.finfo(torch.float16).eps, atol=0)
