import pytest
import torch
from torch import nn

from zeropoint.model.lazy_rows import LazyRows, make_whole

TABLE = torch.arange(21.0).view(7, 3)


@pytest.fixture
def read():
    """Which rows were read, in order."""
    return []


@pytest.fixture
def lazy(read):
    def rows(start, stop):
        read.append((start, stop))
        return TABLE[start:stop].clone()

    return LazyRows((7, 3), torch.float32, rows, 3)


def test_parts_are_all_rows_in_order_and_nothing_is_read_before(lazy, read):
    assert lazy.shape == (7, 3) and lazy.dtype == torch.float32 and read == []
    assert torch.equal(torch.cat(list(lazy.parts())), TABLE)
    assert read == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize(
    "operation",
    [
        lambda t: t + 1,
        lambda t: t.t(),
        lambda t: t.double(),
        lambda t: t[[6, 0]],
        lambda t: torch.cat([t, t]),
        lambda t: nn.functional.embedding(torch.tensor([1, 5]), t),
        lambda t: t.sum(dim=0, keepdim=True),
    ],
)
def test_an_operation_makes_the_whole(lazy, operation):
    result, expected = operation(lazy), operation(TABLE)
    if isinstance(result, LazyRows):
        result = result.whole()
    assert type(result) is torch.Tensor
    assert result.dtype == expected.dtype and torch.equal(result, expected)


def test_a_cast_stays_lazy(lazy, read):
    cast = lazy.to(device="cpu", dtype=torch.bfloat16)
    assert isinstance(cast, LazyRows) and cast.dtype == torch.bfloat16 and read == []
    assert torch.equal(cast.whole(), TABLE.bfloat16())
    assert lazy.to(dtype=torch.float32) is lazy


def test_another_device_gets_the_whole(lazy):
    assert type(lazy.to("meta")) is torch.Tensor and lazy.to("meta").is_meta


def test_parameters_become_plain_and_shared_ones_stay_shared(lazy, read):
    model = nn.Module()
    model.embedding, model.head = nn.Embedding(7, 3), nn.Linear(3, 7)
    model.embedding.weight = model.head.weight = nn.Parameter(lazy, requires_grad=False)
    assert isinstance(model.head.weight, LazyRows) and read == []
    make_whole(model)
    assert type(model.head.weight) is nn.Parameter and not model.head.weight.requires_grad
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, TABLE)
