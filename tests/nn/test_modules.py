"""The table of module types."""

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from zeropoint.nn import MODULES, QConv1D, QEmbedding, QLinear, quantized_type

from .cases import FLOATS


def test_every_row_is_tested():
    assert set(FLOATS) == set(MODULES.values()), "add the new module type to tests/nn/cases.py"


@pytest.mark.parametrize(
    ("module", "expected"),
    [(nn.Linear(2, 3), QLinear), (nn.Embedding(2, 3), QEmbedding), (Conv1D(2, 3), QConv1D)],
    ids=lambda m: type(m).__name__,
)
def test_a_float_type_has_one_counterpart(module, expected):
    assert quantized_type(module) is expected
    assert expected.why_not(module) is None


def test_a_subclass_has_none_because_it_may_read_its_weight_in_its_own_way():
    class Scaled(nn.Linear):
        pass

    assert quantized_type(Scaled(2, 3)) is None
    assert quantized_type(nn.LayerNorm(3)) is None
