"""`zp.fuse`: the model answers as before, is saved as before, and can be brought back."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

import zeropoint as zp
from tests.models import ARCHITECTURES, build, continuation, outputs
from zeropoint import native
from zeropoint.nn.fused import FusedModule

GATED = {"llama", "llama-tied", "qwen2", "mistral"}
LAYERS = 2
pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


def fused_modules(model):
    return [m for m in model.modules() if isinstance(m, FusedModule)]


def assert_same(found, expected):
    """But for float32's roundings: in 2 layers they move logits of size 1 by 2e-6."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("weights", [None, "int4"])
def test_the_model_answers_as_before(name, weights):
    model = build(name)
    if weights is not None:
        zp.quantize(model, weights, strict=False)
        zp.freeze(model)
    expected, keys = outputs(model), list(model.state_dict())
    report = zp.fuse(model)
    gated = name in GATED
    assert (len(report.norms), len(report.gates)) == ((2 * LAYERS + 1, LAYERS) if gated else (0, 0))
    assert (
        str(report) == f"{len(report.norms)} norms and {len(report.gates)} gated perceptrons fused"
    )
    assert list(model.state_dict()) == keys
    assert_same(outputs(model), expected)
    if gated:
        assert report.norms[-1] == "model.norm" and report.gates[0] == "model.layers.0.mlp"
        assert report.to_dict() == {"norms": report.norms, "gates": report.gates, "refused": None}


def test_twice_is_once_and_back_is_as_it_was():
    model = build("llama")
    before, expected = dict(model.named_modules()), outputs(model)
    first = zp.fuse(model)
    assert zp.fuse(model) == first and len(fused_modules(model)) == 3 * LAYERS + 1
    zp.unfuse(model)
    assert dict(model.named_modules()) == before and torch.equal(outputs(model), expected)
    zp.unfuse(model)
    assert not fused_modules(model)


def test_it_may_come_before_quantizing_training_and_saving(tmp_path):
    model = build("llama")
    zp.fuse(model)
    zp.quantize(model, "int4")
    ids = torch.arange(2, 18).view(2, 8)
    zp.finetune(model, [ids] * 2, training=zp.Training(steps=2, window=8, held_out=0))
    zp.freeze(model)
    assert len(fused_modules(model)) == 3 * LAYERS + 1
    zp.save(model, tmp_path)
    loaded, _ = zp.load(tmp_path)
    assert not fused_modules(loaded)
    for other in (loaded, copy.deepcopy(model)):
        assert_same(outputs(model), outputs(other))
        assert torch.equal(continuation(model), continuation(other))
    zp.unfuse(model)
    assert torch.equal(outputs(model), outputs(loaded))
    zp.fuse(model)
    zp.dequantize(model)
    assert len(fused_modules(model)) == 3 * LAYERS + 1
    # Weights that torch multiplies in float32, no longer tokens of 16 bits.
    torch.testing.assert_close(outputs(model), outputs(loaded), rtol=1e-2, atol=1e-3)


def test_modules_with_hooks_are_left_as_they_are():
    model = build("llama")
    seen = []
    model.model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append("gate"))
    model.model.layers[1].mlp.register_full_backward_hook(lambda *_: seen.append("back"))
    report = zp.fuse(model)
    assert "model.norm" not in report.norms and report.gates == ()
    outputs(model)
    assert seen == ["gate", "norm"]


def test_forwards_that_accelerate_has_replaced_are_left_as_they_are():
    model = build("llama")
    seen = []

    class Note(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    norm, mlp = model.model.norm, model.model.layers[0].mlp
    for module in (norm, mlp):
        add_hook_to_module(module, Note())
    report = zp.fuse(model)
    assert "model.norm" not in report.norms and report.gates == ("model.layers.1.mlp",)
    outputs(model)
    assert seen == [mlp, norm]


def test_a_hook_that_comes_later_is_called():
    model = build("llama")
    zp.fuse(model)
    seen = []
    for module in fused_modules(model):
        module.register_forward_hook(lambda m, *_: seen.append(m))
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda m, *_: seen.append(m))
    outputs(model)
    assert set(seen) == {*fused_modules(model), model.model.layers[0].mlp.act_fn}


def test_a_norm_of_two_names_stays_one():
    model = build("llama")
    layers = model.model.layers
    layers[1].input_layernorm = layers[0].input_layernorm
    report = zp.fuse(model)
    assert len(report.norms) == 2 * LAYERS
    assert layers[1].input_layernorm is layers[0].input_layernorm


def test_a_model_that_is_a_norm_itself_is_left():
    norm = build("llama").model.norm
    assert zp.fuse(norm).norms == ()


def test_without_a_library_nothing_is_fused_and_the_report_says_why(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: "no C++ compiler at install")
    model = build("llama")
    report = zp.fuse(model)
    assert not fused_modules(model)
    assert str(report) == "nothing is fused: no C++ compiler at install"
