"""Calibrated quantization of whole models: better than rounding, bounded, and never half done."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import zeropoint as zp
from tests.models import (
    ARCHITECTURES,
    PERCEPTRON_INPUT,
    build,
    example_inputs,
    outputs,
    perceptron,
    tokenizer,
)
from zeropoint.errors import NonFiniteError, RecipeError, UnknownNameError
from zeropoint.flows import calibrate as flow
from zeropoint.flows.data import Calibration
from zeropoint.flows.distance import distance
from zeropoint.model.walk import quantized_modules
from zeropoint.nn import QModule

SMALL = Calibration(tokens=256, window=32)


def error(name, algorithm, weights="int4", **options):
    """Relative error of the outputs on the calibration inputs, and the report."""
    model = build(name)
    expected = outputs(model)
    zp.quantize(model, weights, strict=False)
    if algorithm == "gptq":
        options.setdefault("data", [example_inputs(model)])
    report = zp.freeze(model, algorithm, **options)
    return float((outputs(model) - expected).norm() / expected.norm()), report, model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_calibrated_block_by_block(name):
    rounded, _, _ = error(name, "rtn")
    found, report, model = error(name, "gptq")
    assert found < 0.9 * rounded
    assert report.warnings == ()
    modules = quantized_modules(model)
    assert all(m.frozen for m in modules.values())
    assert [x.name for x in report.layers if x.algorithm == "gptq"]
    assert {x.name for x in report.layers} == set(modules)
    assert any(x.folded_into for x in report.layers) == (name != "perceptron")
    assert not any("pre_hook" in k for k in vars(model) if getattr(model, k))


@pytest.mark.parametrize("weights", ["iq4nl", "mxfp4", "nvfp4"])
def test_formats_with_scales_of_their_own_are_calibrated(weights):
    rounded, _, _ = error("llama-tied", "rtn", weights)
    found, report, model = error("llama-tied", "gptq", weights)
    assert found < 0.9 * rounded
    assert any(x.algorithm == "gptq" for x in report.layers)
    layers = [m.qweight for m in quantized_modules(model).values() if m.role == "linear"]
    scheme = zp.Scheme.of(weights)
    assert {q.scheme for q in layers if q.scheme.format == weights} == {scheme}


def test_layers_say_what_happened_to_them():
    _, report, _ = error("llama-tied", "gptq")
    layers = {x.name: x for x in report.layers}
    q = layers["model.layers.0.self_attn.q_proj"]
    assert (q.algorithm, q.tokens, q.folded_into) == ("gptq", 18, "input_layernorm")
    assert 0 < q.output_error < 0.05 and q.hessian_gain > 1 and q.damping == 0.01
    assert layers["model.embed_tokens"].reason == (
        "an embedding is looked up, not multiplied: no inputs to calibrate by"
    )
    assert layers["lm_head"].reason == "tied to an embedding, which is looked up, not multiplied"
    assert report.worst[0].output_error >= report.worst[-1].output_error
    text = str(report)
    assert text.startswith("gptq: 14 weights by gptq, 2 weights by mse; 18 tokens of batches")
    assert f"  {report.worst[0].name}: " in text and "of the output lost" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["source"] == "batches" and len(data["layers"]) == 16


def test_without_calibration_the_report_has_no_errors():
    _, report, _ = error("llama-tied", "mse")
    assert report.calibration is None and report.worst == ()
    assert {x.algorithm for x in report.layers} == {"mse"}
    assert [x.reason for x in report.layers if x.name == "lm_head"] == [
        "tied to model.embed_tokens"
    ]


def test_a_searched_grid_beats_rounding_on_the_weights():
    losses = {}
    for algorithm in ("rtn", "mse"):
        model = build("llama")
        weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        zp.quantize(model, "int3")
        zp.freeze(model, algorithm)
        found = model.model.layers[0].mlp.up_proj.weight.dequantize()
        losses[algorithm] = float((found - weight).square().sum())
    assert losses["mse"] < 0.95 * losses["rtn"]


def test_the_same_seed_gives_the_same_codes():
    states = []
    for _ in range(2):
        _, _, model = error("llama", "gptq", data="self", calibration=SMALL)
        states.append(model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_balancing_is_a_choice():
    folded, _, _ = error("llama", "gptq", "int3")
    plain, report, _ = error("llama", "gptq", "int3", calibration=Calibration(fold=False))
    assert folded != plain
    assert not any(x.folded_into for x in report.layers)


@torch.no_grad()
def test_balancing_leaves_the_function_of_the_model(monkeypatch):
    """Everything but the rounding: images are the float weights themselves."""
    model = build("llama")
    expected = outputs(model)
    zp.quantize(model, "int8")
    monkeypatch.setattr(flow, "_use_image", lambda module, q: None)
    monkeypatch.setattr(flow, "_embeddings", lambda work: None)
    monkeypatch.setattr(flow, "_rest", lambda work: None)
    seen = []
    monkeypatch.setattr(flow, "_install", lambda work, module: seen.append(module))
    zp.freeze(model, "gptq", data=[example_inputs(model)])
    zp.dequantize(model)  # nothing was installed: the live modules came back
    assert len(seen) == 14
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)


def test_propagation_takes_the_drift_of_inputs_into_account():
    plain, _, _ = error("llama", "gptq", "int3", calibration=Calibration(propagate=0.0))
    found, _, _ = error("llama", "gptq", "int3", calibration=Calibration(propagate=0.5))
    assert found != plain and found < 1.1 * plain


def test_padding_is_not_calibrated_by():
    """Whatever stands in padded places, the codes are the same."""
    states = []
    for filler in (0, 77):
        model = build("bert")
        batch = example_inputs(model)
        batch["attention_mask"][1, 4:] = 0
        batch["input_ids"][1, 4:] = filler
        zp.quantize(model, "int4")
        report = zp.freeze(model, "gptq", data=[batch])
        assert {x.tokens for x in report.layers if "encoder" in x.name} == {9 + 4}
        states.append(model.state_dict())
    different = [k for k, v in states[0].items() if not torch.equal(v, states[1][k])]
    assert not [k for k in different if "encoder" in k]


def test_a_bfloat16_model_stays_one():
    model = build("llama").bfloat16()
    expected = outputs(model).float()
    zp.quantize(model, "int4")
    zp.freeze(model, "gptq", data=[example_inputs(model)])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    found = outputs(model)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


def test_a_saved_model_is_the_same(tmp_path):
    _, _, model = error("llama-tied", "gptq")
    zp.save(model, tmp_path / "m", tokenizer=tokenizer())
    assert zp.verify(tmp_path / "m") == []
    again, _ = zp.load(tmp_path / "m")
    assert torch.equal(outputs(again), outputs(model))


# --- models and data that break it elsewhere ------------------------------------------------------


def test_a_model_without_blocks_is_calibrated_as_a_whole():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    x = torch.randn(200, 64) @ torch.randn(64, 64)
    expected = model(x)
    zp.quantize(model, "int4")
    report = zp.freeze(model, "gptq", data=[x])
    assert {(x.algorithm, x.tokens) for x in report.layers} == {("gptq", 200)}
    assert (model(x) - expected).norm() < 0.1 * expected.norm()


def test_blocks_that_cannot_be_run_alone_are_calibrated_by_hooks():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 32), nn.Tanh())])

        def forward(self, x):
            return self.layers[0](self.layers[0](x))

    model = Shared()
    zp.quantize(model, "int4")
    report = zp.freeze(model, "gptq", data=[torch.randn(50, 32)])
    assert report.warnings == (
        "layers is not run block by block: its blocks run [2] times in one pass, not once each",
    )
    assert [(x.algorithm, x.tokens) for x in report.layers] == [("gptq", 100)]


def test_a_layer_that_no_token_reaches_gets_a_searched_grid():
    model = build("llama")
    model.model.layers[1].unused = nn.Linear(64, 64)
    zp.quantize(model, "int4")
    report = zp.freeze(model, "gptq", data=[example_inputs(model)])
    (layer,) = [x for x in report.layers if x.name.endswith("unused")]
    assert (layer.algorithm, layer.tokens) == ("mse", 0)
    assert layer.reason == "no calibration data reached it"
    assert "model.layers.1.unused: mse, because no calibration data reached it" in str(report)


def test_activations_that_are_not_finite_mean_searched_grids():
    model = build("llama")
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    zp.quantize(model, "int4")
    report = zp.freeze(model, "gptq", data=[example_inputs(model)])
    bad = [x for x in report.layers if x.name.startswith("model.layers.1.")]
    assert {x.reason for x in bad} == {"the Hessian has NaN or Inf: an activation is not finite"}
    assert all(x.algorithm == "gptq" for x in report.layers if ".layers.0." in x.name)
    assert all(m.frozen for m in quantized_modules(model).values())


def test_few_tokens_are_warned_about():
    _, report, _ = error("llama", "gptq", data=torch.tensor([5, 6, 7, 8]))
    assert report.warnings[0].startswith("only 4 calibration tokens, less than one window of 64")
    assert "  warning: only 4 calibration tokens" in str(report)


def test_modules_that_a_rule_keeps_are_left_alone():
    model = build("llama")
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    zp.quantize(model, "int4", exclude=["*.q_proj"])
    report = zp.freeze(model, "gptq", data=[example_inputs(model)])
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
    assert not any("q_proj" in x.name for x in report.layers)
    folded = {x.name.rpartition(".")[2]: x.folded_into for x in report.layers}
    assert folded["k_proj"] is None, "q_proj reads the same norm, and is kept"
    assert folded["up_proj"] == "post_attention_layernorm"


def test_only_what_is_asked_for_is_run():
    model = build("llama")
    zp.quantize(model, "int4", include="model.layers.1.*")
    ran = []
    model.model.norm.register_forward_pre_hook(lambda *_: ran.append(1))
    report = zp.freeze(model, "gptq", data=[example_inputs(model)])
    assert len(report.layers) == 7 and len(ran) == 1, "once, to see that blocks can be run alone"
    model = build("llama")
    zp.quantize(model, "int4", include="model.layers.0.*")
    zp.freeze(model, "gptq", data=[example_inputs(model)])
    outputs(model)


def test_tied_linears_share_their_codes():
    model = build("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    zp.quantize(model, "int4")
    expected = outputs(model)
    report = zp.freeze(model, "gptq", data=[example_inputs(model)])
    assert second.mlp.up_proj.tied_to is first.mlp.up_proj
    assert (outputs(model) - expected).norm() < 0.2 * expected.norm()
    folded = {x.name: x.folded_into for x in report.layers}
    assert folded["model.layers.0.mlp.up_proj"] is folded["model.layers.0.mlp.down_proj"] is None
    assert {x.reason for x in report.layers if x.name == "model.layers.1.mlp.up_proj"} == {
        "tied to model.layers.0.mlp.up_proj"
    }


def test_a_perceptron_of_ones_own_is_calibrated():
    model = perceptron()
    zp.quantize(model, "int4")
    report = zp.freeze(model, "gptq", data=torch.tensor([0, 3, 10, 3, 5]))
    assert {x.name: x.algorithm for x in report.layers} == {
        "embed": "mse",
        "head": "mse",
        "up": "gptq",
        "down": "gptq",
    }


def test_a_call_that_fails_can_be_repeated():
    model = build("llama")
    expected = outputs(model)
    zp.quantize(model, "int4")
    up = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        up[3, 5] = float("inf")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.(gate|up)_proj\.weight"):
        zp.freeze(model, "gptq", data=[example_inputs(model)])
    modules = quantized_modules(model)
    assert modules["model.layers.0.mlp.up_proj"].frozen
    assert not modules["model.layers.1.mlp.up_proj"].frozen
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 0.0
    zp.freeze(model, "gptq", data=[example_inputs(model)])
    assert all(m.frozen for m in quantized_modules(model).values())
    assert (outputs(model) - expected).norm() < 0.2 * expected.norm()


def test_an_interrupt_leaves_a_model_that_works():
    model = build("llama")
    zp.quantize(model, "int4")
    live = outputs(model)

    def stop(what, done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zp.freeze(model, "gptq", data=[example_inputs(model)], on_step=stop)
    assert all(isinstance(m, QModule) for m in quantized_modules(model).values())
    assert (outputs(model) - live).norm() < 0.5 * live.norm()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_training_mode_is_put_back():
    model = build("llama").train()
    zp.quantize(model, "int4")
    zp.freeze(model, "gptq", data=[example_inputs(model)])
    assert model.training and model.model.layers[0].mlp.training


# --- effort and tuning ---------------------------------------------------------------------------


def mean_distance(model, original, batches):
    with torch.no_grad():
        found = [float(distance(model(**b), original(**b), b)) for b in batches]
    return sum(found) / len(found)


def test_tuning_keeps_the_codes_and_comes_nearer_to_the_float_model():
    torch.manual_seed(0)
    original = build("llama-tied")
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)  # answers that depend on the weights
    generator = torch.Generator().manual_seed(0)
    draw = lambda: {"input_ids": torch.randint(1, 99, (4, 16), generator=generator)}  # noqa: E731
    data, unseen = [draw() for _ in range(40)], [draw() for _ in range(8)]
    models = {}
    for steps in (0, 60):
        model = copy.deepcopy(original)
        zp.quantize(model, "int3")
        options = Calibration(tune_steps=steps, propagate=0.0)
        report = zp.freeze(model, "gptq", data=data, calibration=options)
        models[steps] = model
    plain, tuned = models[0].state_dict(), models[60].state_dict()
    assert list(plain) == list(tuned)
    assert all(torch.equal(plain[n], tuned[n]) for n in plain if plain[n].dtype == torch.uint8)
    distances = {steps: mean_distance(m, original, unseen) for steps, m in models.items()}
    assert distances[60] < 0.95 * distances[0]
    assert report.tuning is not None and len(report.tuning.losses) == 60
    assert report.tuning.held_out[-1][1] < report.tuning.held_out[0][1]
    assert "scales tuned: 60 steps on" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["tuning"]["best_step"] > 0


def test_tuning_needs_batches_to_hold_out():
    model = build("llama-tied")
    zp.quantize(model, "int4")
    options = Calibration(tune_steps=4)
    report = zp.freeze(model, "gptq", data=[example_inputs(model)], calibration=options)
    assert report.tuning is None
    assert "nothing was tuned: 18 calibration tokens are 2 batches, too few" in report.warnings[0]


def test_effort_stands_for_a_calibration():
    model = build("llama-tied")
    zp.quantize(model, "int4")
    with pytest.raises(UnknownNameError, match="'hihg' is not an effort; .*'high'"):
        zp.freeze(model, "gptq", data=[example_inputs(model)], effort="hihg")
    with pytest.raises(RecipeError, match="effort='low' stands for a calibration; give one"):
        zp.freeze(model, "gptq", effort="low", calibration=SMALL)
    with pytest.raises(RecipeError, match="'rtn' uses no calibration data; leave data, effort and"):
        zp.freeze(model, "rtn", effort="low")
    with pytest.raises(RecipeError, match="tune_steps=-1: use 0 for none"):
        Calibration(tune_steps=-1)
    report = zp.freeze(model, "gptq", data=[example_inputs(model)], effort="low")
    assert {x.algorithm for x in report.layers} == {"gptq", "mse"}


# --- auto -----------------------------------------------------------------------------------------


def test_auto_judges_by_batches_that_it_keeps_back():
    found, report, _ = error("llama-tied", "auto", data=[example_inputs(build("llama-tied"))] * 8)
    rounded, _, _ = error("llama-tied", "rtn")
    layers = [x for x in report.layers if x.algorithm == "gptq"]
    assert layers and all(x.tokens == report.tokens and x.output_error > 0 for x in layers)
    assert found < rounded


def test_auto_judges_layers_outside_of_blocks_too():
    model = perceptron()
    zp.quantize(model, "int4")
    report = zp.freeze(model, "auto", data=[PERCEPTRON_INPUT] * 8)
    layers = {x.name: x for x in report.layers}
    assert layers["up"].tokens == 8 * PERCEPTRON_INPUT.numel() and layers["up"].output_error > 0


def test_auto_with_one_batch_is_gptq():
    data = [example_inputs(build("llama-tied"))]
    packed = []
    for algorithm in ("gptq", "auto"):
        model = build("llama-tied")
        zp.quantize(model, "int4")
        zp.freeze(model, algorithm, data=data)
        packed.append(model.model.layers[0].self_attn.q_proj.qweight.packed)
    assert torch.equal(*packed)


def test_propagation_does_not_see_the_batches_that_are_kept_back(monkeypatch):
    seen = []
    update = flow.CrossObserver.update

    def counted(self, original, quantized):
        seen.append(len(quantized))
        update(self, original, quantized)

    monkeypatch.setattr(flow.CrossObserver, "update", counted)
    data = [example_inputs(build("llama-tied"))] * 7  # of which drift is measured on four
    calls = {}
    for algorithm in ("gptq", "auto"):
        model = build("llama-tied")
        zp.quantize(model, "int4")
        seen.clear()
        options = Calibration(propagate=0.5)
        zp.freeze(model, algorithm, data=data, calibration=options)
        calls[algorithm] = len(seen)
    assert calls["auto"] == calls["gptq"] * 3 / 4
