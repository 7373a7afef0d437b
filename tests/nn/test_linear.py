import copy
import dataclasses
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from tests.helpers import assert_linear, defaults, freeze, in_child, rtn, schemes
from zeropoint import native
from zeropoint.kernels import ops
from zeropoint.nn import QConv1D, QEmbedding, QLinear
from zeropoint.numerics.activations import round_tokens
from zeropoint.qtensor import QTensor, part_specs
from zeropoint.scheme import Scheme

from .cases import K, N, example_input, float_module, live_module

every_scheme = pytest.mark.parametrize("scheme", schemes(), ids=str)
every_default = pytest.mark.parametrize("scheme", defaults(), ids=str)
both = pytest.mark.parametrize("kind", [QLinear, QConv1D])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# torch's own, when inductor is imported.
torchs_warning = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)


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
        dense.weight.copy_(live.from_layout(rtn(live.float_weight(), scheme).dequantize()))
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


# --- int8 activations -----------------------------------------------------------------------------

every_rounding = pytest.mark.parametrize(
    "scheme", [dataclasses.replace(s, activations="int8") for s in defaults()], ids=str
)


@every_rounding
@dtypes
def test_live_int8_activations_are_rounded_token_by_token(scheme, dtype):
    live = live_module(QLinear, scheme, dtype)
    x = example_input(QLinear, dtype)
    image = rtn(live.weight, scheme).dequantize()
    assert torch.equal(live(x), F.linear(round_tokens(x), image, live.bias))


@both
@every_rounding
def test_frozen_int8_activations_are_rounded_token_by_token(kind, scheme):
    frozen = freeze(live_module(kind, scheme))
    x = example_input(kind)
    x[0, 1] *= 1000  # one token's scale is not another's
    for _ in range(2):  # through the operator, then straight to the kernel
        with torch.no_grad():
            y = frozen(x)
        assert_linear(y, x, frozen.weight, frozen.bias, frozen.kernel)
    assert not torch.allclose(y, frozen.to_float()(x), rtol=1e-4), "rounding has an effect"


@both
@pytest.mark.parametrize("state", ["live", "frozen"])
def test_int8_activations_pass_the_gradient_straight_through(kind, state):
    module = live_module(kind, Scheme.of("int4", activations="int8"))
    image = rtn(module.float_weight(), module.scheme).dequantize().detach()
    if state == "frozen":
        freeze(module)
    x = example_input(kind).requires_grad_()
    module(x).sum().backward()
    assert torch.allclose(x.grad, image.sum(0).expand_as(x), rtol=0, atol=1e-5)  # N terms below 10
    if state == "live":
        dense = torch.ones(N, 6) @ round_tokens(x.detach()).view(6, K)  # dL/dy = 1
        assert torch.allclose(module.from_layout(module.weight.grad), dense, rtol=0, atol=1e-5)


# --- straight to the kernel -----------------------------------------------------------------------

needs_library = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


@pytest.fixture
def calls(monkeypatch):
    """Calls of the operator by modules."""
    seen = []
    operator = ops.linear

    def linear(*arguments):
        seen.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(ops, "linear", linear)
    return seen


def warm(kind=QLinear, scheme=None, dtype=torch.float32, seed=0):
    """A frozen module that has found its way: the next call may leave the operator out."""
    module = freeze(live_module(kind, scheme or Scheme.of("int4"), dtype, seed))
    assert module.kernel == "native"
    with torch.no_grad():
        module(example_input(kind, dtype))
    return module


@needs_library
@both
@every_scheme
def test_only_the_first_call_needs_the_operator_and_the_next_give_the_same_bits(
    kind, scheme, calls
):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        module = freeze(live_module(kind, scheme, dtype))
        if module.kernel != "native":
            pytest.skip(f"native: {module.refused['native']}")
        x = example_input(kind, dtype)
        with torch.no_grad():
            calls.clear()
            expected = module(x)
            assert len(calls) == 1
            for layout in (x, x.mT.contiguous().mT, x[0], x[0, 1], x[:0], x.expand(2, 2, 3, K)):
                y = module(layout)
                assert y.dtype == dtype and y.shape == (*layout.shape[:-1], N)
            assert len(calls) == 1
            assert torch.equal(module(x), expected)


@needs_library
def test_with_gradients_enabled_a_call_that_needs_none_goes_straight(calls):
    module = warm()
    x = example_input(QLinear)
    expected = module(x).detach()
    calls.clear()
    module.bias.requires_grad_(False)
    assert torch.equal(module(x), expected) and not calls
    assert not module(x).requires_grad


@needs_library
@pytest.mark.parametrize("of", ["x", "bias", "both"])
def test_a_call_that_needs_a_gradient_gets_the_right_one(of, calls):
    module = warm()
    module.bias.requires_grad_(of != "x")
    x = example_input(QLinear).requires_grad_(of != "bias")
    calls.clear()
    y = module(x)
    assert len(calls) == 1 and y.requires_grad
    y.sum().backward()
    if of != "bias":
        expected = module.weight.dequantize().sum(0).expand_as(x)
        assert torch.allclose(x.grad, expected, rtol=0, atol=1e-5)  # N terms below 10
    if of != "x":
        assert module.bias.grad.tolist() == [6.0] * N
    with torch.no_grad():
        assert torch.equal(module(x), y)
    assert len(calls) == 1
    with torch.inference_mode():
        assert torch.equal(module(x), y)
    assert len(calls) == 1


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@needs_library
def test_a_dispatch_mode_sees_the_operator():
    module = warm()
    x = example_input(QLinear)
    with torch.no_grad():
        expected = module(x)
        with Log() as log:
            y = module(x)
    assert log.seen == ["zeropoint.linear.default"] and torch.equal(y, expected)


@needs_library
def test_fake_tensors_are_not_multiplied():
    module = warm()
    x = example_input(QLinear)
    with torch.no_grad():
        expected = module(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            y = module(mode.from_tensor(x))
            assert type(y).__name__ == "FakeTensor" and y.shape == expected.shape
        assert torch.equal(module(x), expected)


@needs_library
def test_a_module_whose_parts_are_fake_multiplies_nothing():
    in_child(_use_fake_parts)


def _use_fake_parts(step):
    scheme, x = Scheme.of("int4"), example_input(QLinear)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {
            suffix: torch.empty(shape, dtype=dtype)
            for suffix, (shape, dtype) in part_specs(torch.Size((N, K)), scheme).items()
        }
        module = QLinear.from_float(nn.Linear(K, N), scheme)
        weight = QTensor(
            packed=fakes[""],
            scale=fakes["_scale"],
            zero_point=fakes["_zero_point"],
            scheme=scheme,
            shape=torch.Size((N, K)),
            dtype=torch.float32,
        )
        module.freeze(weight)
        for call in ("first", "second"):
            step(f"{call} call inside the mode")
            assert module(mode.from_tensor(x)).shape == (2, 3, N)
    with torch.no_grad():
        for call in ("first", "second"):
            step(f"{call} call outside the mode")
            assert type(module(mode.from_tensor(x))).__name__ == "FakeTensor"
            with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
                step(f"{call} call outside the mode with a real x")
                mode.allow_non_fake_inputs = False
                module(x)


@needs_library
def test_make_fx_records_the_operator():
    module = warm()
    x = example_input(QLinear)
    with torch.no_grad():
        graph = make_fx(module)(x)
        assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
            torch.ops.zeropoint.linear.default
        ]
        assert torch.equal(graph(x + 1), module(x + 1))


@needs_library
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_jit_trace_records_the_operator():
    module = warm()
    x = example_input(QLinear)
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        assert "zeropoint::linear" in str(traced.graph)
        assert torch.equal(traced(x + 1), module(x + 1))


@needs_library
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_gives_what_a_loop_gives():
    module = warm()
    x = example_input(QLinear)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(module)(x), module(x))
        assert torch.equal(torch.func.vmap(module, in_dims=1, out_dims=1)(x), module(x))


@needs_library
@torchs_warning
@pytest.mark.parametrize("gradient", [False, True])
def test_compile_records_the_operator(gradient):
    module = warm()
    x = example_input(QLinear).requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        expected = module(x)
        recorded = []

        def backend(graph, inputs):
            recorded.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        torch._dynamo.reset()
        assert torch.equal(torch.compile(module, backend=backend, fullgraph=True)(x), expected)
        assert sum("zeropoint" in name and "linear" in name for name in recorded) == 1
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        assert torch.equal(module(x), expected)
        torch._dynamo.reset()
        if gradient:
            compiled(x).sum().backward()
            dense = module.weight.dequantize().sum(0).expand_as(x)
            assert torch.allclose(x.grad, dense, rtol=0, atol=1e-5)  # N terms below 10


@needs_library
@pytest.mark.parametrize("strict", [False, True])
def test_export_records_the_operator(strict):
    module = warm()
    x = example_input(QLinear)
    with torch.no_grad():
        program = torch.export.export(module, (x,), strict=strict)
        targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
        assert targets == [torch.ops.zeropoint.linear.default]
        assert torch.equal(program.module()(x), module(x))


@needs_library
def test_subclasses_of_tensors_go_through_the_operator(calls):
    class Mine(torch.Tensor):
        pass

    module = warm()
    x = example_input(QLinear)
    calls.clear()
    with torch.no_grad():
        y = module(x.as_subclass(Mine))
    assert len(calls) == 1 and torch.equal(torch.Tensor(y), module(x).detach())


@needs_library
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, K + 1), rf"x is \(2, {K + 1}\), but weight is \({N}, {K}\)"),
        (torch.ones(2, K - 1), rf"x is \(2, {K - 1}\), but weight is \({N}, {K}\)"),
        (torch.tensor(1.0), r"x is \(\), but weight is"),
        (torch.ones(2, K, dtype=torch.int32), "x is torch.int32; linear needs a float dtype"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_call(x, message):
    module = warm()
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                module(x)


@needs_library
def test_float64_and_a_bias_of_another_dtype_work_on_every_call():
    module = warm()
    x = example_input(QLinear)
    with torch.no_grad():
        for _ in range(2):
            y = warm(seed=0).double()(x.double())
            assert_linear(y.float(), x, module.weight, module.bias, "native")
        for dtype in (torch.bfloat16, torch.float16):
            module.bias.data = module.bias.data.to(dtype)
            for _ in range(2):
                assert_linear(module(x), x, module.weight, module.bias, "native")


# The parts a module holds now are those it multiplies by.


def copied(module):
    return copy.deepcopy(module)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def shared(module):
    return module.share_memory()


def cast(module):
    return module.to(torch.bfloat16).to(torch.float32)


@needs_library
@both
@pytest.mark.parametrize("change", [copied, pickled, saved, shared, cast])
def test_a_copied_moved_or_cast_module_multiplies_by_its_own_parts(kind, change, calls):
    module = warm(kind)
    x = example_input(kind)
    with torch.no_grad():
        expected = module(x)
        bias = module.bias.detach().to(torch.bfloat16).float() - module.bias
        changed = change(module)
        for _ in range(3):
            y = changed(x)
            if change is cast:  # which rounds the bias
                y = y - bias
                assert (y - expected).abs().max() <= 4 * torch.finfo(y.dtype).eps * y.abs().max()
            else:
                assert torch.equal(y, expected)
        calls.clear()
        changed(x)
        assert not calls
        changed.weight.packed.zero_()
        assert not torch.equal(changed(x), expected)
        if changed is not module:
            assert torch.equal(module(x), expected)


@needs_library
@both
@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_what_is_multiplied_by(kind, assign, calls):
    module, other = warm(kind), warm(kind, seed=5)
    x = example_input(kind)
    with torch.no_grad():
        expected = other(x)
        assert not torch.equal(module(x), expected)
        state = {name: t.clone() for name, t in other.state_dict().items()}
        module.load_state_dict(state, assign=assign)
        for _ in range(2):
            assert torch.equal(module(x), expected)
        calls.clear()
        assert torch.equal(module(x), expected) and not calls
        state["weight"].zero_()
        assert torch.equal(module(x), expected) != assign


@needs_library
def test_parts_swapped_for_one_call_are_used_for_that_call():
    module, other = warm(), warm(seed=5)
    x = example_input(QLinear)
    with torch.no_grad():
        before, expected = module(x), other(x)
        for _ in range(2):
            state = dict(other.state_dict())
            assert torch.equal(torch.func.functional_call(module, state, (x,)), expected)
            assert torch.equal(module(x), before)


@needs_library
def test_a_tied_module_multiplies_by_what_its_owner_holds():
    embedding = freeze(live_module(QEmbedding, Scheme.of("int4")))
    head = QLinear.from_float(nn.Linear(K, N, bias=False), embedding.scheme)
    head.freeze_tied(embedding)
    x = example_input(QLinear)
    with torch.no_grad():
        for _ in range(3):
            assert_linear(head(x), x, embedding.weight, None, "native")
        other = freeze(live_module(QEmbedding, Scheme.of("int4"), seed=3))
        embedding.load_state_dict(
            {n: t.clone() for n, t in other.state_dict().items()}, assign=True
        )
        for _ in range(3):
            assert_linear(head(x), x, other.weight, None, "native")


@needs_library
def test_parts_that_a_module_no_longer_holds_are_freed():
    module = warm()
    old = weakref.ref(module.weight.packed)
    module.to("meta")
    gc.collect()
    assert old() is None


@needs_library
def test_a_module_runs_the_kernel_that_it_names(monkeypatch):
    module = warm()
    monkeypatch.setenv("ZEROPOINT_KERNEL", "torch")
    module.to(torch.float32)
    assert module.kernel == "torch"
    x = example_input(QLinear)
    with torch.no_grad():
        assert torch.equal(module(x), ops.linear(x, module.weight, module.bias, "torch"))
