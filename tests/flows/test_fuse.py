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
    assert len(report.attentions) == (LAYERS if gated else 0)
    assert str(report) == (
        "5 norms, 2 gated perceptrons and 2 attentions fused"
        if gated
        else "0 norms, 0 gated perceptrons and 0 attentions fused"
    )
    assert list(model.state_dict()) == keys
    assert_same(outputs(model), expected)
    if gated:
        assert report.norms[-1] == "model.norm" and report.gates[0] == "model.layers.0.mlp"
        assert report.attentions[0] == "model.layers.0.self_attn"
        assert report.to_dict() == {
            "norms": report.norms,
            "gates": report.gates,
            "attentions": report.attentions,
            "refused": None,
        }


def test_twice_is_once_and_back_is_as_it_was():
    model = build("llama")
    before, expected = dict(model.named_modules()), outputs(model)
    first = zp.fuse(model)
    assert zp.fuse(model) == first and len(fused_modules(model)) == 4 * LAYERS + 1
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
    assert len(fused_modules(model)) == 4 * LAYERS + 1
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
    assert len(fused_modules(model)) == 4 * LAYERS + 1
    # Weights that torch multiplies in float32, no longer tokens of 16 bits.
    torch.testing.assert_close(outputs(model), outputs(loaded), rtol=1e-2, atol=1e-3)


def test_modules_with_hooks_are_left_as_they_are():
    model = build("llama")
    seen = []
    model.model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append("gate"))
    model.model.layers[1].mlp.register_full_backward_hook(lambda *_: seen.append("back"))
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: seen.append("attention"))
    report = zp.fuse(model)
    assert "model.norm" not in report.norms and report.gates == ()
    assert report.attentions == ("model.layers.0.self_attn",)
    outputs(model)
    assert seen == ["gate", "attention", "norm"]


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


IDS = torch.arange(2, 18).view(2, 8)


def _with_gptq(model):
    zp.quantize(model, "int4", group_size=32)
    zp.freeze(model, "gptq", data=[IDS])


@pytest.mark.parametrize(
    "change",
    [
        zp.rotate,
        lambda model: zp.prune_heads(model, {0: [0, 1], 1: [2, 3]}),
        lambda model: zp.head_importance(model, [{"input_ids": IDS, "labels": IDS}]),
        _with_gptq,
    ],
    ids=["rotated", "pruned", "weighed", "gptq"],
)
def test_what_looks_into_a_model_does_not_notice(change):
    model, fused = build("llama"), build("llama")
    zp.fuse(fused)
    result, expected = change(fused), change(model)
    if isinstance(expected, zp.HeadImportance):
        torch.testing.assert_close(result.scores, expected.scores)
    assert_same(outputs(fused), outputs(model))
    zp.unfuse(fused)
    for (name, found), before in zip(
        fused.state_dict().items(), model.state_dict().values(), strict=True
    ):
        if found.is_floating_point():
            assert_same(found, before)
        else:
            assert (found != before).float().mean() < 0.01, name  # codes on the edge


# --- generating -----------------------------------------------------------------------------------

PADDED = {
    "input_ids": torch.tensor([[0, 0, 0, 5, 6, 7], [2, 3, 4, 5, 6, 7]]),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("name", sorted(GATED))
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},  # drafts, and cuts the cache where they were wrong
        {"use_cache": False},
        PADDED,
    ],
    ids=["greedy", "beams", "static", "drafts", "uncached", "padded"],
)
def test_it_generates_the_same(name, how, monkeypatch):
    model = build(name)
    inputs = {"input_ids": torch.tensor([[2, 3, 4, 5, 4, 5, 4]])}
    settings = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}

    def generate():
        return model.generate(**inputs | settings | how, output_logits=True)

    expected = generate()
    zp.fuse(model)
    attended = []
    attend = native.attend
    monkeypatch.setattr(native, "attend", lambda *a: attended.append(a) or attend(*a))
    found = generate()
    assert torch.equal(found.sequences, expected.sequences)
    for logits, before in zip(found.logits, expected.logits, strict=True):
        assert_same(logits, before)
    # Masks, static caches and sliding windows are left to the float module.
    left = how is PADDED or "cache_implementation" in how or name == "mistral"
    assert bool(attended) != left


def test_a_cache_may_be_continued_by_the_float_model_and_back():
    model, ids = build("llama"), torch.arange(2, 22)[None]
    expected = model(ids).logits
    zp.fuse(model)
    with torch.no_grad():
        found = [(out := model(ids[:, :8], use_cache=True)).logits]
        for begin, end in ((8, 9), (9, 10), (10, 13), (13, 14), (14, 19), (19, 20)):
            (zp.unfuse if begin in (9, 14) else zp.fuse)(model)
            out = model(ids[:, begin:end], past_key_values=out.past_key_values)
            found.append(out.logits)
    assert_same(torch.cat(found, 1), expected)


def test_another_attention_chosen_later_is_that():
    model = build("llama")
    zp.fuse(model)
    ids = torch.arange(2, 12)[None]
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    assert_same(model(ids).logits, expected)
    assert zp.fuse(build("llama")).attentions  # but is not found by
    model = build("llama")
    model.set_attn_implementation("eager")
    assert zp.fuse(model).attentions == ()


def test_without_a_library_nothing_is_fused_and_the_report_says_why(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: "no C++ compiler at install")
    model = build("llama")
    report = zp.fuse(model)
    assert not fused_modules(model)
    assert str(report) == "nothing is fused: no C++ compiler at install"
