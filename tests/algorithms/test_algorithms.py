from typing import get_args

import pytest
import torch

from tests.helpers import example_weight, schemes
from zeropoint.algorithms import ALGORITHMS, Needs, get_algorithm
from zeropoint.algorithms.choice import Moments
from zeropoint.errors import UnknownNameError
from zeropoint.qtensor import check_parts

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


@every_algorithm
@pytest.mark.parametrize("scheme", schemes(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_algorithm_returns_the_parts_of_its_scheme_and_leaves_the_weight(name, scheme, dtype):
    weight = example_weight(dtype=dtype)
    before = weight.clone()
    q = get_algorithm(name)(weight, scheme, Moments(torch.eye(weight.shape[1])))
    check_parts("weight", q.parts, weight.shape, scheme)
    assert q.scheme == scheme and q.shape == weight.shape and q.dtype == dtype
    assert torch.equal(weight, before)
    assert torch.isfinite(q.dequantize()).all()


def test_an_unknown_algorithm_names_the_known_ones():
    with pytest.raises(UnknownNameError, match="'rtm' is not an algorithm; close: 'rtn'"):
        get_algorithm("rtm")


def test_an_algorithm_that_calibrates_says_what_it_does_without_data():
    weight, scheme = example_weight(), schemes()[-1]
    choice = get_algorithm("gptq").choose(weight, None, scheme)
    assert (choice.algorithm, choice.reason) == ("mse", "no calibration data reached it")


@every_algorithm
def test_every_row_says_what_it_needs(name):
    row = ALGORITHMS[name]
    assert row.name == name and row.needs in get_args(Needs) and row.summary
