"""How inputs of linear layers are rounded: every way, live and frozen, beside every kernel."""

import copy
import hashlib
import io
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from tests.helpers import assert_linear, freeze, rtn
from zeropoint.kernels import ops
from zeropoint.nn import QConv1D, QLinear
from zeropoint.nn.inputs import InputRange
from zeropoint.numerics import Quantized
from zeropoint.numerics.activations import (
    round_but_outliers,
    round_static,
    round_tokens,
    static_parameters,
)
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

from .cases import K, N, example_input, live_module

SEEN = InputRange(observer="minmax", samples=6, low=-1.0, high=3.0)
STATIC = static_parameters(SEEN.low, SEEN.high, "int8")
STATIC_FLOAT8 = static_parameters(SEEN.low, SEEN.high, "float8_e4m3fn")


def with_static(module, format="int8"):
    module.fix_input(*static_parameters(SEEN.low, SEEN.high, format), SEEN)
    return module


def plain(kind, **options):
    return lambda weights: live_module(kind, Scheme.of(weights, **options))


# What a module is, and what its input is on its way to the product.
WAYS = {
    "int8 tokens": ({"activations": "int8"}, False, round_tokens),
    "float8 tokens": (
        {"activations": "float8_e4m3fn"},
        False,
        lambda x: round_tokens(x, "float8_e4m3fn"),
    ),
    "float8_e5m2 tokens": (
        {"activations": "float8_e5m2"},
        False,
        lambda x: round_tokens(x, "float8_e5m2"),
    ),
    "int8 static": ({"activations": "int8"}, True, lambda x: round_static(x, *STATIC)),
    "float8 static": (
        {"activations": "float8_e4m3fn"},
        True,
        lambda x: round_static(x, *STATIC_FLOAT8, "float8_e4m3fn"),
    ),
    "outliers": (
        {"activations": "int8", "outlier_threshold": 2.5},
        False,
        lambda x: round_but_outliers(x, 2.5),
    ),
}
every_way = pytest.mark.parametrize("way", WAYS)
weights = pytest.mark.parametrize("weights", ["int8", "int4", "nf4", "bfloat16"])
both = pytest.mark.parametrize("kind", [QLinear, QConv1D])


def module_of(way, weights="int8", kind=QLinear, dtype=torch.float32, **options):
    """Live; and the rounding of its input."""
    given, static, rounding = WAYS[way]
    module = live_module(kind, Scheme.of(weights, **given, **options), dtype)
    return with_static(module, given["activations"]) if static else module, rounding


@both
@every_way
@weights
def test_a_live_module_multiplies_its_image_by_rounded_inputs(way, weights, kind):
    module, rounding = module_of(way, weights, kind)
    x = example_input(kind)
    image = rtn(module.float_weight(), module.scheme).dequantize()
    assert torch.equal(module(x), F.linear(rounding(x), image, module.bias))
    assert not torch.equal(rounding(x), x)


@both
@every_way
@weights
@pytest.mark.parametrize("kernel", ["native", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_module_multiplies_its_codes_by_rounded_inputs(
    way, weights, kind, kernel, dtype, monkeypatch
):
    if kernel == "native" and ops.get_kernel("native").why_not is None:
        pytest.skip("no native kernel")
    monkeypatch.setenv("ZEROPOINT_KERNEL", kernel)
    module, rounding = module_of(way, weights, kind, dtype)
    freeze(module)
    x = example_input(kind, dtype)
    float_inputs = module._qweight(module._weight_only)
    for _ in range(3):  # through the operator, then straight to the kernel
        with torch.no_grad():
            y = module(x)
        if way == "int8 tokens":
            assert_linear(y, x, module.qweight, module.bias, kernel)
        else:
            assert_linear(y, rounding(x), float_inputs, module.bias, kernel)


@every_way
@pytest.mark.parametrize("state", ["live", "frozen"])
def test_the_gradient_passes_straight_through(way, state):
    module, rounding = module_of(way)
    image = rtn(module.float_weight(), module.scheme).dequantize().detach()
    if state == "frozen":
        freeze(module)
    x = example_input(QLinear).requires_grad_()
    module(x).sum().backward()
    assert torch.allclose(x.grad, image.sum(0).expand_as(x), rtol=0, atol=1e-5)  # N terms below 10
    if state == "live":
        dense = torch.ones(N, 6) @ rounding(x.detach()).view(6, K)  # dL/dy = 1
        assert torch.allclose(module.weight.grad, dense, rtol=0, atol=1e-5)


@every_way
def test_only_dynamic_int8_is_left_to_the_operator(way, monkeypatch):
    seen = []
    operator = ops.linear

    def linear(x, weight, bias, kernel):
        seen.append(weight.scheme.activations)
        return operator(x, weight, bias, kernel)

    monkeypatch.setattr(ops, "linear", linear)
    module, _ = module_of(way)
    freeze(module)(example_input(QLinear))
    assert seen == ["int8" if way == "int8 tokens" else None]
    assert (module._eager is None) == (way != "int8 tokens"), "the first branch is for that one"


def test_the_operator_refuses_activations_that_it_would_not_round():
    module = freeze(live_module(QLinear, Scheme.of("int8", activations="float8_e4m3fn")))
    with pytest.raises(RuntimeError, match="float8_e4m3fn activations are rounded before the op"):
        ops.linear(example_input(QLinear), module.qweight, None, "torch")


@every_way
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("state", ["live", "frozen"])
def test_it_compiles_as_one_graph_and_exports(way, state):
    module, _ = module_of(way)
    if state == "frozen":
        freeze(module)
    x = example_input(QLinear)
    with torch.no_grad():
        expected = module(x)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
        assert torch.equal(program.module()(x), expected)
        if way != "outliers":  # a column is kept for all tokens
            assert torch.equal(program.module()(torch.cat([x, x])), module(torch.cat([x, x])))
        torch._dynamo.reset()


@every_way
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("state", ["live", "frozen"])
def test_a_token_that_is_not_finite_gives_no_finite_output_and_spoils_no_other(way, value, state):
    module, _ = module_of(way)
    if state == "frozen":
        freeze(module)
    x = example_input(QLinear).view(6, K)
    x[3, 5] = value
    with torch.no_grad():
        for _ in range(3):
            assert module(x).isfinite().any(1).tolist() == [True, True, True, False, True, True]


# --- the compute dtype ----------------------------------------------------------------------------

compute_dtypes = pytest.mark.parametrize("compute", ["bfloat16", "float16", "float32"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@both
@compute_dtypes
@dtypes
def test_a_live_module_multiplies_in_its_compute_dtype(kind, compute, dtype):
    module = live_module(kind, Scheme.of("int4", compute_dtype=compute), dtype)
    x = example_input(kind, dtype)
    narrow = getattr(torch, compute)
    image = rtn(module.float_weight(), module.scheme).dequantize()
    expected = F.linear(x.to(narrow), image.to(narrow), module.bias.to(narrow)).to(dtype)
    assert torch.equal(module(x), expected)


@compute_dtypes
@dtypes
@pytest.mark.parametrize("kernel", ["native", "torch"])
@pytest.mark.parametrize("activations", [None, "int8", "float8_e4m3fn"])
def test_a_frozen_module_multiplies_in_its_compute_dtype(
    compute, dtype, kernel, activations, monkeypatch
):
    monkeypatch.setenv("ZEROPOINT_KERNEL", kernel)
    scheme = Scheme.of("int4", compute_dtype=compute, activations=activations)
    module = freeze(live_module(QLinear, scheme, dtype))
    x = example_input(QLinear, dtype)
    narrow = getattr(torch, compute)
    inner = x.to(narrow)
    if activations == "float8_e4m3fn":
        inner = round_tokens(inner, "float8_e4m3fn")
    weight = module._qweight(Scheme.of("int4", activations=activations and "int8"))
    if activations != "int8":
        weight = module._qweight(Scheme.of("int4"))
    expected = ops.linear(inner, weight, module.bias.to(narrow), kernel).to(dtype)
    for _ in range(3):
        with torch.no_grad():
            y = module(x)
        assert y.dtype == dtype and torch.equal(y, expected)
    assert module._eager is None and "weight" in module.state_dict()


@pytest.mark.parametrize("state", ["live", "frozen"])
def test_a_compute_dtype_passes_gradients_in_the_models_dtype(state):
    module = live_module(QLinear, Scheme.of("int8", compute_dtype="bfloat16"))
    if state == "frozen":
        freeze(module)
    x = example_input(QLinear).requires_grad_()
    module(x).sum().backward()
    assert x.grad.dtype == module.bias.grad.dtype == torch.float32 and x.grad.abs().max() > 0


@pytest.mark.parametrize("state", ["live", "frozen"])
def test_a_compute_dtype_does_not_take_integers(state):
    module = live_module(QLinear, Scheme.of("int8", compute_dtype="bfloat16"))
    if state == "frozen":
        freeze(module)
    with pytest.raises(RuntimeError, match="float|dtype"):
        module(torch.ones(2, K, dtype=torch.int64))


# --- a static range is part of the module ---------------------------------------------------------


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("state", ["live", "frozen"])
@pytest.mark.parametrize("change", [copy.deepcopy, saved], ids=["copied", "pickled"])
def test_a_static_range_is_copied_and_saved_with_the_module(change, state):
    module = with_static(live_module(QLinear, Scheme.of("int8", activations="int8")))
    if state == "frozen":
        freeze(module)
    x = example_input(QLinear)
    again = change(module)
    assert torch.equal(again(x), module(x)) and again.input_range == SEEN
    again.input_scale.fill_(100.0)
    assert not torch.equal(again(x), module(x)), "its own"


@pytest.mark.parametrize("state", ["live", "frozen"])
@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.float64)])
def test_a_cast_leaves_the_range_and_a_move_moves_it(cast, state):
    module = with_static(live_module(QLinear, Scheme.of("int8", activations="int8")))
    if state == "frozen":
        freeze(module)
    cast(module)
    assert torch.equal(module.input_scale, STATIC[0]) and module.input_scale.dtype == torch.float32
    assert torch.equal(module.input_zero_point, STATIC[1])
    assert module.input_zero_point.dtype == torch.int8
    moved = module.to("meta")
    assert {t.device.type for t in moved.state_dict().values()} == {"meta"}


def test_a_static_range_survives_freezing_and_is_in_the_state_dict():
    module = with_static(live_module(QLinear, Scheme.of("int8", activations="int8")))
    assert {"input_scale", "input_zero_point"} < module.state_dict().keys()
    assert "static input" in repr(module)
    freeze(module)
    assert {
        "input_scale",
        "input_zero_point",
        "weight",
        "weight_scale",
    } < module.state_dict().keys()
    other = with_static(freeze(live_module(QLinear, module.scheme, seed=4)))
    other.input_scale.fill_(9.0)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(example_input(QLinear)), module(example_input(QLinear)))


def test_a_new_range_replaces_the_first_for_modules_that_have_run():
    module = freeze(live_module(QLinear, Scheme.of("int8", activations="int8")))
    x = example_input(QLinear)
    with torch.no_grad():
        dynamic = [module(x) for _ in range(3)][-1]
        with_static(module)
        static = [module(x) for _ in range(3)][-1]
        module.fix_input(*static_parameters(-8.0, 8.0, "int8"), None)
        wider = module(x)
    assert not torch.equal(dynamic, static) and not torch.equal(static, wider)
    float_inputs = module._qweight(module._weight_only)
    assert_linear(static, round_static(x, *STATIC), float_inputs, module.bias, module.kernel)


def test_while_watched_inputs_are_shown_and_not_rounded():
    for state in ("live", "frozen"):
        module = live_module(QLinear, Scheme.of("int8", activations="int8"))
        if state == "frozen":
            freeze(module)
        x = example_input(QLinear)
        with torch.no_grad():
            before = [module(x) for _ in range(3)][-1]
            seen = []
            module.watch(seen.append)
            outputs = [module(x) for _ in range(3)]
            module.watch(None)
            after = [module(x) for _ in range(3)][-1]
        assert len(seen) == 3 and all(s is x for s in seen)
        assert torch.equal(before, after) and not torch.equal(outputs[0], before)
        if state == "live":
            image = rtn(module.float_weight(), module.scheme).dequantize()
            assert torch.equal(outputs[0], F.linear(x, image, module.bias))
        else:
            weight = module._qweight(module._weight_only)
            assert_linear(outputs[2], x, weight, module.bias, module.kernel)


# --- bitsandbytes ---------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent.parent / "golden" / "llm_int8.safetensors"
SHA256 = "6c8a35e33b4f3d503423ee25b8d842c59b862679aa8ea05f7d9a820ca1fdecb3"


@pytest.mark.parametrize("case", ["many", "one"])
@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_outliers_are_treated_as_bitsandbytes_does(case, kernel, monkeypatch):
    """See `golden/make_llm_int8.py`. What one token's outliers are depends on the others."""
    monkeypatch.setenv("ZEROPOINT_KERNEL", kernel)
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == SHA256
    with safe_open(GOLDEN, "pt") as file:
        assert file.metadata() == {"producer": "bitsandbytes 0.50.2", "threshold": "6.0"}
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    x = golden[f"{case}.x"]
    n, k = golden["weight_codes"].shape
    y = {}
    for threshold in (6.0, None):
        scheme = Scheme.of(
            "int8", activations="int8", outlier_threshold=threshold, compute_dtype="float16"
        )
        codes = Quantized(golden["weight_codes"], golden["weight_absmax"][:, None] / 127, None)
        linear = torch.nn.Linear(k, n)
        linear.bias.data = golden["bias"].clone()
        module = QLinear.from_float(linear, scheme)
        module.freeze(QTensor.from_codes(codes, scheme, torch.float16))
        with torch.no_grad():
            y[threshold] = module(x)
    kept = (round_but_outliers(x, 6.0) == x).all(0).nonzero().view(-1)
    assert set(golden[f"{case}.columns"].tolist()) <= set(kept.tolist())
    # Theirs rounds the outliers' weights and partial sums to float16, ours the rounded inputs (and
    # the weights in the torch kernel), both the result: 3 roundings of a half ulp each.
    image = module.qweight.dequantize(torch.float64)
    size = x.double().abs() @ image.abs().T + golden["bias"].double().abs()
    bound = 3 * torch.finfo(torch.float16).eps / 2 * size
    assert ((y[6.0] - golden[f"{case}.y"]).double().abs() <= bound).all()
    assert ((y[None] - golden[f"{case}.plain"]).double().abs() <= bound).all()


@pytest.mark.parametrize("state", ["live", "frozen"])
def test_with_planted_outliers_plain_int8_loses_the_rest_and_outliers_kept_do_not(state):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(40, K, generator=generator).clamp(-4, 4)
    x[:, [5, 77]] = 200 * torch.randn(40, 2, generator=generator).sign()
    lost = {}
    for threshold in (None, 6.0):
        scheme = Scheme.of("int8", activations="int8", outlier_threshold=threshold)
        module = live_module(QLinear, scheme)
        image = rtn(module.float_weight(), scheme).dequantize().detach()
        if state == "frozen":
            freeze(module)
        with torch.no_grad():
            error = module(x) - F.linear(x, image, module.bias)
        rest = x.clone()
        rest[:, [5, 77]] = 0
        lost[threshold] = (error.norm() / (rest @ image.T).norm()).item()
    assert lost[None] > 0.3, "the step is 200 / 127: what is not an outlier is all but gone"
    assert lost[6.0] < 0.015
