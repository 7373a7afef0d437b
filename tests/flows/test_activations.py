"""zp.calibrate: from what a model is run on to static ranges."""

import copy

import pytest
import torch
from torch import nn

import zeropoint as zp
from tests.models import build, continuation, example_inputs
from zeropoint.errors import (
    NonFiniteError,
    RecipeError,
    ScaleRangeError,
    StateError,
    UnknownNameError,
)
from zeropoint.nn import QLinear
from zeropoint.numerics.activations import static_parameters
from zeropoint.observers import OBSERVERS, make_observer
from zeropoint.scheme import Recipe, Rule, Scheme

states = pytest.mark.parametrize("state", ["live", "frozen"])
W = 64


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def two_layers(activations="int8", state="frozen", **options):
    """Two layers with a GELU between them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(W, 2 * W), nn.GELU(), nn.Linear(2 * W, W))
    zp.quantize(model, "int8", activations=activations, **options)
    if state == "frozen":
        zp.freeze(model)
    return model.eval()


def ranges(model):
    return {row.module: (row.low, row.high) for row in zp.calibration_table(model).rows}


def state_of(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same_state(model, before, output):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert not any(m.watched for m in model.modules() if isinstance(m, QLinear))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    x = noise(3, W, seed=9)
    with torch.no_grad():
        assert torch.equal(model(x), output)


# --- what it does ---------------------------------------------------------------------------------


@states
@pytest.mark.parametrize("observer", OBSERVERS)
def test_ranges_are_those_of_inputs_that_nothing_has_rounded(state, observer):
    model = two_layers(state=state)
    x = noise(200, W)
    with zp.calibrate(model, observer), torch.no_grad():
        model(x[:150])
        model(x[150:])
    plain = two_layers(activations=None, state=state)
    with torch.no_grad():
        hidden = plain[1](plain[0](x))
    for row, seen in zip(zp.calibration_table(model).rows, (x, hidden), strict=True):
        wanted = make_observer(observer, "int8")
        wanted.update(seen[:150])
        wanted.update(seen[150:])
        found = wanted.result()
        assert (row.low, row.high, row.samples) == pytest.approx(found, rel=1e-5)
        assert row.observer == str(wanted)
        scale, zero_point = static_parameters(row.low, row.high, "int8")
        assert (row.scale, row.zero_point) == (scale.item(), zero_point.item())


@states
@pytest.mark.parametrize("activations", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_afterwards_every_token_is_rounded_by_the_same_range(state, activations):
    model = two_layers(activations, state)
    x = noise(100, W)
    with torch.no_grad():
        dynamic = model(x)
        with zp.calibrate(model, "minmax"):
            exact = model(x)
        static = model(x)
        first, alone = model[0](x)[:1], model[0](x[:1])
    assert not torch.equal(static, dynamic) and not torch.equal(static, exact)
    # One token may be multiplied as 16-bit integers, a hundred in float32. A second layer would
    # round that difference to another code now and then.
    assert torch.allclose(alone, first, atol=1e-4)
    assert (static - exact).norm() < 0.1 * exact.norm()
    layer = model[2]
    assert (layer.input_zero_point is None) == (activations != "int8")
    if activations == "int8":
        assert layer.input_zero_point < -100, "after a GELU nearly all codes are above zero"


def test_an_asymmetric_range_loses_less_than_a_symmetric_one_would():
    model = two_layers()
    x = noise(300, W)
    with torch.no_grad():
        with zp.calibrate(model, "minmax"):
            exact = model(x)
        lost = (model(x) - exact).norm()
        layer = model[2]
        high = layer.input_range.high
        layer.fix_input(*static_parameters(-high, high, "int8"), layer.input_range)
        assert (model(x) - exact).norm() > 1.3 * lost


def test_one_range_for_all_calls_of_a_module_and_of_modules_with_one_weight():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(W, W)
            self.again = nn.Linear(W, W)
            self.again.weight = self.layer.weight

        def forward(self, x):
            return self.again(10 * self.layer(-3 * torch.tanh(self.layer(x))))

    model = Twice()
    zp.quantize(model, "int8", activations="int8")
    zp.freeze(model)
    with zp.calibrate(model, "minmax"), torch.no_grad():
        model(noise(50, W))
    rows = {row.module: row for row in zp.calibration_table(model).rows}
    assert rows["layer"].samples == 100 and rows["again"].samples == 50
    assert rows["layer"].low < -2.0 and rows["again"].high > rows["layer"].high, "each its own"
    assert model.again.tied_to is model.layer


def test_layers_called_without_their_hooks_are_seen():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(W, W)

        def forward(self, x):
            return self.layer.forward(x)

    model = Direct()
    zp.quantize(model, "int8", activations="int8")
    with zp.calibrate(model):
        model.forward(noise(5, W))
    assert zp.calibration_table(model).rows[0].samples == 5


@states
def test_generating_is_seen_token_by_token(state):
    model = build("llama")
    zp.quantize(model, "int8", activations="int8")
    if state == "frozen":
        zp.freeze(model)
    with zp.calibrate(model, "minmax"):
        continuation(model, new_tokens=4)
    prompt = example_inputs(model)["input_ids"]
    for row in zp.calibration_table(model).rows:
        assert row.samples == prompt.numel() + 3 * len(prompt)
    assert continuation(model).shape[1] == prompt.shape[1] + 4


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt2"])
def test_padding_changes_no_range(name):
    model = build(name)
    zp.quantize(model, "int8", activations="int8")
    inputs = example_inputs(model)
    encoder = "decoder_input_ids" in inputs
    tokens = inputs["input_ids"]
    mask = torch.ones_like(tokens)
    with zp.calibrate(model, "mse"), torch.no_grad():
        model(**inputs | {"attention_mask": mask})
    expected = ranges(model)
    padded = torch.cat([tokens, torch.full_like(tokens, 7)], dim=1)
    longer = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    with zp.calibrate(model, "mse"), torch.no_grad():
        model(**inputs | {"input_ids": padded, "attention_mask": longer})
    found = ranges(model)
    assert found.keys() == expected.keys()
    for layer, (low, high) in expected.items():
        assert found[layer] == pytest.approx((low, high), rel=1e-3), layer
    with zp.calibrate(model, "mse"), torch.no_grad():
        model(**inputs | {"input_ids": padded})
    assert ranges(model) != found, "without the mask it is text"
    assert encoder == (name == "t5")


@states
def test_calibrating_again_replaces_the_first(state):
    model = two_layers(state=state)
    x = noise(50, W)
    with torch.no_grad():
        with zp.calibrate(model, "minmax"):
            exact = model(100 * x)
        with zp.calibrate(model, "percentile", percentile=99.0):
            assert torch.allclose(model(100 * x), exact), "float again inside"
    row = zp.calibration_table(model).rows[0]
    assert row.observer == "percentile 99" and row.high < 0.8 * 100 * x.max()
    other = two_layers(state=state)
    with torch.no_grad():
        with zp.calibrate(other, "percentile", percentile=99.0):
            other(100 * x)
        assert torch.equal(model(x), other(x))


def test_calibrating_before_freezing_and_after_give_the_same():
    x = noise(100, W)
    models = []
    for order in ("calibrate", "freeze"):
        model = two_layers(state="live")
        if order == "freeze":
            zp.freeze(model)
        with zp.calibrate(model, "minmax"), torch.no_grad():
            model(x)
        if order == "calibrate":
            zp.freeze(model)
        models.append(model)
    first, second = models
    assert ranges(first)["2"] == pytest.approx(ranges(second)["2"], rel=1e-4)
    assert first[0].frozen and first[0].input_range == second[0].input_range


def test_an_algorithm_that_rescales_inputs_is_not_run_after_calibrating():
    model = two_layers(state="live")
    x = noise(100, W)
    with zp.calibrate(model), torch.no_grad():
        model(x)
    with pytest.raises(StateError, match="^0 has a static range, and algorithm='gptq' changes wh"):
        zp.freeze(model, "gptq", data=[x])
    assert not model[0].frozen
    zp.freeze(model, "mse")
    assert model[0].frozen and model[0].input_scale is not None
    other = two_layers(state="live")
    zp.freeze(other, "gptq", data=[x])
    with zp.calibrate(other), torch.no_grad():
        other(x)


def test_a_compiled_model_is_seen():
    model = two_layers()
    x = noise(20, W)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        compiled(x)
        with zp.calibrate(model, "minmax"):
            compiled(x)
        assert [row.samples for row in zp.calibration_table(model).rows] == [20, 20]
        assert torch.equal(compiled(x), model(x))
        torch._dynamo.reset()


def test_training_goes_on_with_static_ranges():
    model = two_layers(state="live").train()
    x = noise(50, W)
    with zp.calibrate(model, "minmax"):
        model(x).sum().backward()
    assert model.training
    model.zero_grad()
    model(x).square().sum().backward()
    assert model[0].weight.grad.abs().max() > 0


def test_layers_with_an_outlier_threshold_stay_dynamic():
    plain = Scheme.of("int8", activations="int8")
    kept = Scheme.of("int8", activations="int8", outlier_threshold=6.0)
    model = nn.Sequential(nn.Linear(W, W), nn.Linear(W, W))
    zp.quantize(
        model, recipe=Recipe(rules=(Rule(match="0", scheme=plain), Rule(match="1", scheme=kept)))
    )
    with zp.calibrate(model):
        model(noise(5, W))
    assert [row.module for row in zp.calibration_table(model).rows] == ["0"]


# --- what it refuses ------------------------------------------------------------------------------


def test_models_without_rounded_inputs_are_refused():
    text = r'no layer .* rounds its inputs; call zp.quantize\(model, ..., activations="int8"\)'
    for model in (nn.Linear(3, 3), two_layers(activations=None)):
        with pytest.raises(StateError, match=text):
            with zp.calibrate(model):
                raise AssertionError("not entered")
    model = two_layers(outlier_threshold=6.0)
    with pytest.raises(StateError, match="has an outlier_threshold, and decides by each input"):
        with zp.calibrate(model):
            raise AssertionError("not entered")


def test_options_that_make_no_sense_are_refused_before_anything_runs():
    model = two_layers()
    for arguments, error, text in (
        ({"observer": "minmx"}, UnknownNameError, "'minmx' is not an observer; close: 'minmax'"),
        ({"observer": "mse", "percentile": 99.0}, RecipeError, "observer='mse' has no percentile"),
        ({"observer": "percentile", "percentile": 3.0}, RecipeError, "percentile=3.0 is not above"),
        ({"observer": "minmax", "momentum": 0.5}, RecipeError, "'minmax' has no momentum"),
    ):
        with pytest.raises(error, match=text):
            with zp.calibrate(model, **arguments):
                raise AssertionError("not entered")
    with pytest.raises(RecipeError, match="observer='kl' compares the steps of int8"):
        with zp.calibrate(two_layers("float8_e4m3fn"), "kl"):
            raise AssertionError("not entered")


@pytest.fixture(params=["dynamic", "static"])
def calibrated(request):
    """A frozen model before a calibration that fails, its state and its output."""
    model = two_layers()
    with torch.no_grad():
        if request.param == "static":
            with zp.calibrate(model, "minmax"):
                model(noise(20, W, seed=5))
        output = model(noise(3, W, seed=9))
    return model, state_of(model), output


def test_a_layer_that_saw_nothing_is_named_and_nothing_changes(calibrated):
    model, before, output = calibrated
    with pytest.raises(StateError, match="^2 saw no input while calibrating; run the model on dat"):
        with zp.calibrate(model):
            model[0](noise(5, W))
    assert_same_state(model, before, output)
    with pytest.raises(StateError, match="^0 and 1 other layers saw no input"):
        with zp.calibrate(model):
            pass
    assert_same_state(model, before, output)


def test_an_error_inside_changes_nothing(calibrated):
    model, before, output = calibrated
    with pytest.raises(KeyboardInterrupt):
        with zp.calibrate(model):
            model(noise(5, W))
            raise KeyboardInterrupt
    assert_same_state(model, before, output)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_naming_the_layer(value, calibrated):
    model, before, output = calibrated
    x = noise(5, W)
    x[2, 3] = value
    with pytest.raises(
        NonFiniteError, match="^0: its input holds NaN or Inf, of which there is no"
    ):
        with zp.calibrate(model):
            model(x)
    assert_same_state(model, before, output)


def test_a_range_that_float32_cannot_hold_is_refused_naming_the_layer():
    model = nn.Sequential(nn.Linear(W, W))
    zp.quantize(model, "int8", activations="int8")
    model.double()
    with pytest.raises(
        ScaleRangeError, match=r"^0: its inputs reach from -1e\+60 to 1e\+60: a sca"
    ):
        with zp.calibrate(model, "minmax"):
            model(torch.tensor([-1e60, 1e60] * (W // 2), dtype=torch.float64))
    assert model[0].input_scale is None


def test_calibrating_inside_calibrating_is_refused_and_ends_both(calibrated):
    model, before, output = calibrated
    with pytest.raises(StateError, match="is being calibrated already; leave that `with` first"):
        with zp.calibrate(model):
            model(noise(5, W))
            with zp.calibrate(model, "minmax"):
                raise AssertionError("not entered")
    assert_same_state(model, before, output)
    with zp.calibrate(model):
        with pytest.raises(StateError, match="is being calibrated already"):
            with zp.calibrate(model):
                raise AssertionError("not entered")
        model(noise(5, W))
    assert zp.calibration_table(model).rows[0].samples == 5, "the outer one went on"


# --- the table ------------------------------------------------------------------------------------


def test_the_table_prints_and_converts():
    model = two_layers()
    with zp.calibrate(model, "minmax"), torch.no_grad():
        model(noise(1234, W))
    table = zp.calibration_table(model)
    head, first, second = str(table).splitlines()
    assert head.split() == [
        "module",
        "samples",
        "low",
        "high",
        "scale",
        "zero",
        "point",
        "observer",
    ]
    assert first.split()[:2] == ["0", "1,234"] and first.endswith("minmax")
    assert repr(table) == str(table) and second.startswith("2 ")
    rows = table.to_dict()["modules"]
    assert [row["module"] for row in rows] == ["0", "2"]
    assert rows[0].keys() == {
        "module", "observer", "samples", "low", "high", "scale", "zero_point",
    }  # fmt: skip


@pytest.mark.parametrize("activations", ["int8", "float8_e4m3fn"])
def test_a_range_of_unknown_origin_shows_what_the_codes_reach(activations):
    model = two_layers(activations)
    model[0].fix_input(*static_parameters(-2.0, 6.0, activations), None)
    (row,) = zp.calibration_table(model).rows
    assert (row.observer, row.samples) == (None, None)
    expected = (-2.0, 6.0) if activations == "int8" else (-6.0, 6.0)
    assert (row.low, row.high) == pytest.approx(expected, rel=0.01)
    assert str(zp.calibration_table(model)).splitlines()[1].split()[0] == "0"


def test_without_ranges_there_is_no_table():
    for model in (nn.Linear(2, 2), two_layers()):
        with pytest.raises(StateError, match="no layer of the model has a static range; run it on"):
            zp.calibration_table(model)


def test_a_copy_keeps_its_ranges():
    model = two_layers()
    with zp.calibrate(model), torch.no_grad():
        model(noise(50, W))
    again = copy.deepcopy(model)
    assert zp.calibration_table(again) == zp.calibration_table(model)
