import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tests.helpers import assert_linear, defaults, freeze, rtn, schemes
from zeropoint.nn import QConv1D, QLinear
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

from .cases import K, N, example_input, float_module, live_module

every_scheme = pytest.mark.parametrize("scheme", schemes(), ids=str)
every_default = pytest.mark.parametrize("scheme", defaults(), ids=str)
both = pytest.mark.parametrize("kind", [QLinear, QConv1D])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@every_scheme
@dtypes
def test_live_linear_multiplies_by_the_fake_quantized_weight(scheme, dtype):
    live = live_module(QLinear, scheme, dtype)
    x = example_input(QLinear, dtype)
    image = rtn(live.weight, scheme).dequantize()
    assert torch.equal(live(x), F.linear(x, image, live.bias))


@every_scheme
@dtypes
def test_live_conv1d_multiplies_by_the_fake_quantized_transpose(scheme, dtype):
    live = live_module(QConv1D, scheme, dtype)
    x = example_input(QConv1D, dtype)
    assert live.weight.shape == (K, N) and live.float_weight().shape == (N, K)
    assert_linear(live(x), x, rtn(live.weight.t().contiguous(), scheme), live.bias)


@both
@every_default
def test_the_gradient_of_a_live_weight_is_that_of_its_image(kind, scheme):
    """Straight through: what a dense layer holding the image would get."""
    live = live_module(kind, scheme)
    dense = float_module(kind)
    with torch.no_grad():
        dense.weight.copy_(live._layout(rtn(live.float_weight(), scheme).dequantize()))
    x = example_input(kind)
    copies = [x.clone().requires_grad_() for _ in range(2)]
    live(copies[0]).square().sum().backward()
    dense(copies[1]).square().sum().backward()
    for found, expected in (
        (live.weight.grad, dense.weight.grad),
        (live.bias.grad, dense.bias.grad),
        (copies[0].grad, copies[1].grad),
    ):
        # The same sums of at most K terms, perhaps in another order: relative to the largest entry.
        bound = 4 * K * torch.finfo(torch.float32).eps * expected.abs().max()
        assert found.shape == expected.shape and (found - expected).abs().max() <= bound
    assert live.weight.grad.abs().max() > 0


@both
def test_a_training_step_moves_the_image(kind):
    live = live_module(kind, Scheme.of("int4"))
    x = example_input(kind)
    optimizer = torch.optim.SGD(live.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = live(x).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@both
def test_a_frozen_module_passes_gradients_to_x_and_bias_only(kind):
    frozen = freeze(live_module(kind, Scheme.of("int4")))
    x = example_input(kind).requires_grad_()
    frozen(x).sum().backward()
    expected = frozen.weight.dequantize().sum(0)
    assert torch.allclose(x.grad, expected.expand_as(x), rtol=0, atol=1e-5)  # N terms below 10
    assert frozen.bias.grad.tolist() == [6.0] * N
    assert [name for name, _ in frozen.named_parameters()] == ["bias"]


def test_without_bias_nothing_is_added_and_none_is_registered():
    linear = nn.Linear(K, N, bias=False)
    live = QLinear.from_float(linear, Scheme.of("int8"))
    assert live.bias is None and "bias" not in live.state_dict()
    assert not live(torch.zeros(1, K)).any()
    assert live.to_float().bias is None
    frozen = freeze(live)
    assert not frozen(torch.zeros(1, K)).any() and frozen.to_float().bias is None


@both
@every_default
def test_to_float_of_a_live_module_has_the_same_parameters(kind, scheme):
    module = float_module(kind).eval()
    live = kind.from_float(module, scheme)
    back = live.to_float()
    assert type(back) is type(module) and not back.training
    assert back.weight is module.weight and back.bias is module.bias
    x = example_input(kind)
    assert torch.equal(back(x), module(x))


@both
@every_default
def test_to_float_of_a_frozen_module_has_the_dequantized_weight_in_the_float_layout(kind, scheme):
    frozen = freeze(live_module(kind, scheme, torch.bfloat16))
    assert isinstance(frozen.weight, QTensor) and frozen.weight.shape == (N, K)
    back = frozen.to_float()
    assert isinstance(back.weight, nn.Parameter) and back.weight.dtype == torch.bfloat16
    expected = frozen.weight.dequantize()
    assert torch.equal(back.weight, expected if kind is QLinear else expected.t())
    assert back.weight.is_contiguous() and back.bias is frozen.bias
    x = example_input(kind, torch.bfloat16)
    assert back(x).shape == (2, 3, N)


def test_to_float_of_conv1d_computes_what_the_original_class_does():
    back = freeze(live_module(QConv1D, Scheme.of("int4"))).to_float()
    assert type(back) is Conv1D and back.nf == N
    x = example_input(QConv1D)
    dense = back.weight.t().contiguous()
    bound = 2 * K * torch.finfo(torch.float32).eps * (x.abs() @ dense.abs().T + back.bias.abs())
    assert ((back(x) - F.linear(x, dense, back.bias)).abs() <= bound).all()


@pytest.mark.parametrize(
    ("kind", "scheme", "text"),
    [
        (
            QLinear,
            Scheme.of("int4"),
            "QLinear(in_features=128, out_features=6, bias=True, int4 g32 asymmetric, {})",
        ),
        (
            QConv1D,
            Scheme.of("int8"),
            "QConv1D(in_features=128, out_features=6, bias=True, int8 per channel, {})",
        ),
    ],
)
def test_the_repr_names_sizes_scheme_and_state(kind, scheme, text):
    module = live_module(kind, scheme)
    assert repr(module) == text.format("live")
    assert repr(freeze(module)) == text.format(f"frozen, kernel={module.kernel}")
