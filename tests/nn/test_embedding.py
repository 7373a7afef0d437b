import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import assert_embedding, defaults, freeze, rtn, schemes
from zeropoint.nn import QEmbedding
from zeropoint.scheme import Scheme

from .cases import K, N, example_input, float_module, live_module

every_scheme = pytest.mark.parametrize("scheme", schemes(), ids=str)
every_default = pytest.mark.parametrize("scheme", defaults(), ids=str)
states = pytest.mark.parametrize("state", ["live", "frozen"])


def module_in(state, scheme=None):
    module = live_module(QEmbedding, scheme or Scheme.of("int4"))
    return freeze(module) if state == "frozen" else module


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_live_rows_are_the_rows_of_the_fake_quantized_weight(scheme, dtype):
    live = live_module(QEmbedding, scheme, dtype)
    image = rtn(live.weight, scheme).dequantize()
    indices = example_input(QEmbedding)
    assert torch.equal(live(indices), F.embedding(indices, image))
    for row in range(N):  # alone, a row must not get a scale of its own where the tensor shares one
        assert torch.equal(live(torch.tensor(row)), image[row])


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_rows_are_the_dequantized_ones(scheme, dtype):
    frozen = freeze(live_module(QEmbedding, scheme, dtype))
    indices = example_input(QEmbedding)
    assert_embedding(frozen(indices), indices, frozen.weight, dtype)


@every_default
def test_gradients_reach_the_rows_looked_up_and_not_the_padding(scheme):
    live = live_module(QEmbedding, scheme)
    indices = example_input(QEmbedding)  # 1 twice, 4 never, padding_idx 2 once
    live(indices).sum().backward()
    assert live.weight.grad[:, 0].tolist() == [1.0, 2.0, 0.0, 1.0, 0.0, 1.0]


@states
@every_default
def test_no_index_gives_no_row(state, scheme):
    y = module_in(state, scheme)(torch.zeros(2, 0, dtype=torch.long))
    assert y.shape == (2, 0, K)


@states
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_one_index_and_int32_work_as_in_torch(state, dtype):
    module = module_in(state)
    row = module(torch.tensor(3, dtype=dtype))
    assert row.shape == (K,)
    assert torch.equal(row, module(torch.tensor([[3]]))[0, 0])


@states
@pytest.mark.parametrize("index", [-1, N])
def test_an_index_outside_is_refused_as_torch_does(state, index):
    with pytest.raises((IndexError, RuntimeError)):
        module_in(state)(torch.tensor([index]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_norm": 1.0}, "Embedding with max_norm=1.0 is not supported"),
        ({"scale_grad_by_freq": True}, "Embedding with scale_grad_by_freq=True is not supported"),
        ({"sparse": True}, "Embedding with sparse=True is not supported"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(options, reason):
    assert QEmbedding.why_not(nn.Embedding(4, 8, **options)) == reason
    assert QEmbedding.why_not(nn.Embedding(4, 8, padding_idx=1)) is None


@every_default
def test_to_float_of_a_live_module_has_the_same_parameter(scheme):
    module = float_module(QEmbedding).eval()
    back = QEmbedding.from_float(module, scheme).to_float()
    assert type(back) is nn.Embedding and back.weight is module.weight
    assert back.padding_idx == 2 and not back.training


@every_default
def test_to_float_of_a_frozen_module_has_the_dequantized_weight(scheme):
    frozen = freeze(live_module(QEmbedding, scheme, torch.bfloat16))
    back = frozen.to_float()
    assert isinstance(back.weight, nn.Parameter) and back.weight.dtype == torch.bfloat16
    assert torch.equal(back.weight, frozen.weight.dequantize())
    assert (back.num_embeddings, back.embedding_dim, back.padding_idx) == (N, K, 2)


def test_the_repr_names_sizes_scheme_and_state():
    module = live_module(QEmbedding, Scheme.of("nf4", group_size=32))
    assert repr(module) == "QEmbedding(6, 128, padding_idx=2, nf4 g32, live)"
    assert (
        repr(freeze(module))
        == f"QEmbedding(6, 128, padding_idx=2, nf4 g32, frozen, kernel={module.kernel})"
    )
    plain = QEmbedding.from_float(nn.Embedding(3, 8), Scheme.of("int8"))
    assert repr(plain) == "QEmbedding(3, 8, int8 per channel, live)"


@states
def test_activations_are_of_linear_layers_only(state):
    scheme = Scheme.of("int8")
    rounded = module_in(state, dataclasses.replace(scheme, activations="int8"))
    indices = example_input(QEmbedding)
    assert torch.equal(rounded(indices), module_in(state, scheme)(indices))
