"""Static ranges of inputs on disk: stored bit by bit, and damage is found."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import zeropoint as zp
from tests.models import build, example_inputs, outputs
from zeropoint.checkpoints import native
from zeropoint.errors import CheckpointError, StateError
from zeropoint.model.walk import quantized_modules

from .cases import edit_manifest, edit_tensors, read_manifest


def calibrated(name="llama", activations="int8", observer="mse"):
    """A frozen model with static ranges."""
    model = build(name)
    zp.quantize(model, "int4", activations=activations)
    zp.freeze(model)
    with zp.calibrate(model, observer), torch.no_grad():
        model(**example_inputs(model))
    return model


@pytest.fixture
def path(tmp_path):
    zp.save(calibrated(), tmp_path / "m")
    return tmp_path / "m"


LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "bert", "t5-tied", "gpt2"])
@pytest.mark.parametrize("activations", ["int8", "float8_e4m3fn"])
def test_ranges_come_back_bit_by_bit_with_their_table(name, activations, tmp_path):
    model = calibrated(name, activations)
    zp.save(model, tmp_path / "m")
    assert zp.verify(tmp_path / "m") == []
    again, _ = zp.load(tmp_path / "m")
    assert zp.calibration_table(again) == zp.calibration_table(model)
    state = model.state_dict()
    assert any(key.endswith(".input_scale") for key in state)
    for key, tensor in again.state_dict().items():
        assert tensor.dtype == state[key].dtype and torch.equal(tensor, state[key]), key
    assert torch.equal(outputs(again), outputs(model))
    stored = load_file(tmp_path / "m" / "model.safetensors")
    zero_points = {key for key in stored if key.endswith(".input_zero_point")}
    assert bool(zero_points) == (activations == "int8")
    zp.save(again, tmp_path / "n")
    first, second = (read_manifest(tmp_path / n) for n in "mn")
    assert all(first[key] == second[key] for key in ("inputs", "tensors", "weights", "tied"))


def test_a_cast_while_loading_leaves_the_ranges(path):
    model, _ = zp.load(path, dtype="bfloat16")
    layer = model.get_submodule(LAYER)
    stored = load_file(path / "model.safetensors")
    assert torch.equal(layer.input_scale, stored[f"{LAYER}.input_scale"])
    assert layer.input_scale.dtype == torch.float32 and layer.input_scale.shape == ()


def test_a_layer_with_two_names_and_layers_with_one_weight(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.second = self.first
            self.third = nn.Linear(32, 32, bias=False)
            self.third.weight = self.first.weight

        def forward(self, x):
            return self.third(9 * self.second(self.first(x)))

    model = Shared()
    zp.quantize(model, "int8", activations="int8")
    zp.freeze(model)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with zp.calibrate(model, "minmax"):
            model(x)
        expected = model(x)
        zp.save(model, tmp_path / "m")
        assert zp.verify(tmp_path / "m") == []
        again, _ = zp.load(tmp_path / "m", model=Shared())
        assert again.first is again.second and torch.equal(again(x), expected)
    assert zp.calibration_table(again) == zp.calibration_table(model)
    edit_tensors(tmp_path / "m", lambda t: t["third.input_scale"].fill_(-1.0))
    assert zp.verify(tmp_path / "m") == ["third.input_scale holds -1.0, but scales are positive"]


def test_a_model_without_ranges_has_no_such_key(tmp_path):
    model = build("bert")
    zp.quantize(model, "int8", activations="int8")
    zp.freeze(model)
    zp.save(model, tmp_path / "m")
    assert "inputs" not in read_manifest(tmp_path / "m")
    with pytest.raises(StateError, match="no layer of the model has a static range"):
        zp.calibration_table(zp.load(tmp_path / "m")[0])


def test_ranges_of_unknown_origin_are_ranges(path):
    edit_manifest(path, lambda m: m.pop("inputs"))
    assert zp.verify(path) == []
    rows = zp.calibration_table(zp.load(path)[0]).rows
    assert len(rows) == 14 and {(r.observer, r.samples) for r in rows} == {(None, None)}


def test_another_tensor_of_that_name_is_no_scale(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.register_buffer("input_scale", torch.tensor(-1.0))

    model = Odd()
    zp.quantize(model, "int8")
    zp.freeze(model)
    zp.save(model, tmp_path / "m")
    assert zp.verify(tmp_path / "m") == []
    assert zp.load(tmp_path / "m", model=Odd())[0].input_scale == -1.0


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "holds 0.0, but scales are positive"),
        (-2.0, "holds -2.0, but scales are positive"),
        (torch.nan, "holds NaN or Inf"),
        (torch.inf, "holds NaN or Inf"),
    ],
)
def test_a_scale_that_is_none_is_found(path, value, message):
    edit_tensors(path, lambda t: t[f"{LAYER}.input_scale"].fill_(value))
    assert zp.verify(path) == [f"{LAYER}.input_scale {message}"]


def replace_tensor(path, name, tensor):
    """Store another tensor, and say so in the manifest."""
    row = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    edit_tensors(path, lambda t: t.update({name: tensor}))
    edit_manifest(path, lambda m: m["tensors"].update({name: row}))


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("input_scale", torch.ones(2), r"\(2,\) torch.float32, but one torch.float32 is needed"),
        ("input_scale", torch.tensor(1.0).half(), r"\(\) torch.float16, but one torch.float32"),
        ("input_zero_point", torch.tensor(1), r"\(\) torch.int64, but one torch.int8 is needed"),
    ],
)
def test_a_part_of_another_shape_or_dtype_is_refused(path, part, tensor, message):
    replace_tensor(path, f"{LAYER}.{part}", tensor)
    with pytest.raises(CheckpointError, match=f"{LAYER}.{part} is {message}"):
        zp.load(path)


def test_a_missing_zero_point_is_refused(path):
    name = f"{LAYER}.input_zero_point"
    edit_tensors(path, lambda t: t.pop(name))
    edit_manifest(path, lambda m: m["tensors"].pop(name))
    with pytest.raises(CheckpointError, match=f"lacks {name}, which the model has"):
        zp.load(path)


def test_a_range_for_a_layer_that_has_none_is_refused(path):
    edit_manifest(path, lambda m: m["weights"][f"{LAYER}.weight"]["scheme"].pop("activations"))
    with pytest.raises(CheckpointError, match=f"holds {LAYER}.input_scale, but int4 g32 asymmetri"):
        zp.load(path)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "its 'inputs' is not an object"),
        ({"x": 3}, "the input of x has not the keys observer, samples, low, high"),
        ({"x": {"observer": "mse"}}, "the input of x has not the keys observer, samples, low, hi"),
        (
            {"x": {"observer": "mse", "samples": "many", "low": 0, "high": 1.0}},
            "the input of x has samples='many'",
        ),
    ],
)
def test_a_table_that_makes_no_sense_is_found(path, inputs, message):
    edit_manifest(path, lambda m: m.update({"inputs": inputs}))
    (problem,) = zp.verify(path)
    assert message in problem and native.MANIFEST in problem
    with pytest.raises(CheckpointError, match=message):
        zp.load(path)


def test_every_layer_of_the_model_is_in_the_table(path):
    model, _ = zp.load(path)
    rounding = {n for n, m in quantized_modules(model).items() if m.scheme.activations}
    assert read_manifest(path)["inputs"].keys() == rounding
