"""Heads that are gone count as heads whose output is 0: float, live, frozen, saved and loaded."""

from __future__ import annotations

import copy
import json
import pickle
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import nn

import zeropoint as zp
from tests.helpers import schemes
from tests.models import ARCHITECTURES, build, continuation, example_inputs, outputs, perceptron
from zeropoint.errors import CheckpointError, RecipeError, StateError
from zeropoint.model.attention import attentions
from zeropoint.model.load import float_skeleton
from zeropoint.nn import QModule
from zeropoint.scheme import Recipe, Rule, Scheme

pytestmark = pytest.mark.usefixtures("torch_kernel")

T5 = {
    "encoder.block.0.layer.0.SelfAttention": [1],
    "encoder.block.1.layer.0.SelfAttention": [0, 2],
    "decoder.block.0.layer.0.SelfAttention": [3],
    "decoder.block.0.layer.1.EncDecAttention": [0],
    "decoder.block.1.layer.1.EncDecAttention": [1],
}
# 4 heads of 16 columns; the groups of int4 are two heads.
HEADS = {
    "llama": {0: [2, 3]},
    "qwen2": {1: [0, 1]},
    "gpt2": {0: [1, 3], 1: [0]},
    "gpt-neox": {0: [0, 1], 1: [3]},
    "opt": {1: [1]},
    "bert": {0: [1, 2], 1: [3]},
    "bert-masked": {0: [1]},
    "t5-tied": T5,
    "vit": {0: [1]},
    "whisper": {"encoder.layers.0.self_attn": [1], "decoder.layers.1.encoder_attn": [0, 3]},
}
every_model = pytest.mark.parametrize("name", HEADS)


@contextmanager
def silenced(model, heads):
    """These heads' outputs are 0 inside; heads by their places in the model as it is."""
    handles = []
    for attention in attentions(model):
        mask = torch.ones(attention.heads, attention.head_dim)
        mask[list(heads.get(attention.label, ()))] = 0

        def zero(_, args, mask=mask):
            return (args[0] * mask.view(-1), *args[1:])

        handles.append(attention.output.register_forward_pre_hook(zero))
    yield
    for handle in handles:
        handle.remove()


def in_state(name: str, state: str, weights: str = "int4", **options):
    model = build(name)
    if state != "float":
        zp.quantize(model, weights, **options)
    if state == "frozen":
        zp.freeze(model)
    return model


@every_model
@pytest.mark.parametrize("state", ["float", "frozen"])
def test_the_outputs_are_those_without_the_heads(name, state, tmp_path):
    model = in_state(name, state)
    whole = outputs(model)
    with silenced(model, HEADS[name]):
        expected = outputs(model)
    report = zp.prune_heads(model, HEADS[name])
    assert torch.allclose(outputs(model), expected, rtol=0, atol=2e-6 * expected.abs().max())
    assert not torch.allclose(whole, expected, rtol=0, atol=2e-4 * whole.abs().max())
    assert report.bytes_after < report.bytes_before
    assert model.config.pruned_heads == HEADS[name]
    if state == "frozen":
        zp.save(model, tmp_path / "m")
    else:
        model.save_pretrained(tmp_path / "m")
    again, _ = zp.load(tmp_path / "m")
    assert type(again) is type(model) and torch.equal(outputs(again), outputs(model))
    assert again.config.pruned_heads == HEADS[name]
    if name in ("llama", "gpt2", "t5-tied"):
        assert torch.equal(continuation(again), continuation(model))


@every_model
def test_a_live_model_is_the_pruned_model_quantized(name):
    """int8: a scale for each row, so that no group changes."""
    model, pruned = in_state(name, "live", "int8"), build(name)
    zp.prune_heads(model, HEADS[name])
    zp.prune_heads(pruned, HEADS[name])
    zp.quantize(pruned, "int8")
    assert torch.equal(outputs(model), outputs(pruned))
    zp.freeze(model)
    zp.freeze(pruned)
    assert torch.equal(outputs(model), outputs(pruned))


def test_a_live_weight_gets_groups_that_divide_it():
    model = in_state("gpt2", "live")
    zp.prune_heads(model, {0: [1], 1: [0, 3]})
    schemes_now = [str(block.attn.c_proj.scheme) for block in model.transformer.h]
    assert schemes_now == ["int4 g16 asymmetric", "int4 g32 asymmetric"]
    live = outputs(model)
    zp.freeze(model)
    assert torch.allclose(outputs(model), live, atol=1e-5)


@pytest.mark.parametrize("scheme", schemes(), ids=str)
def test_frozen_codes_are_kept_by_every_scheme(scheme, tmp_path):
    model = build("bert")
    rules = (Rule(match="*.attention.*", scheme=scheme),)
    zp.quantize(model, recipe=Recipe(rules=rules), strict=False)
    zp.freeze(model)
    old = {n: m.qweight for n, m in model.named_modules() if isinstance(m, QModule)}
    zp.prune_heads(model, {0: [1, 2], 1: [1]})
    for name, before in old.items():
        kept = [0, 3] if ".layer.0." in name else [0, 2, 3]
        places = torch.arange(64).view(4, 16)[kept].view(-1)
        expected = before.dequantize()
        expected = expected[:, places] if name.endswith("dense") else expected[places]
        assert torch.equal(model.get_submodule(name).qweight.dequantize(), expected)
    zp.save(model, tmp_path / "m")
    assert torch.equal(outputs(zp.load(tmp_path / "m")[0]), outputs(model))


def test_torn_groups_get_smaller_and_8_bit_scales_become_floats_and_the_report_says_so():
    model = in_state("bert", "frozen", "nf4", group_size=32, double_quant=True)
    report = zp.prune_heads(model, {1: [1]})
    assert (
        "  encoder.layer.1.attention.self.key: 64 x 64 -> 48 x 64, nf4 g32 double quant -> nf4 g32"
        in str(report)
    )
    assert "output.dense: 64 x 64 -> 64 x 48, nf4 g32 double quant -> nf4 g16" in str(report)
    whole = zp.prune_heads(in_state("bert", "frozen", "int4"), {1: [2, 3]})
    assert "output.dense: 64 x 64 -> 64 x 32, int4 g32 asymmetric" in str(whole)
    assert "->  int4 g16" not in str(whole)


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt-neox", "t5-tied"])
def test_pruning_twice_is_pruning_once_by_the_original_numbers(name):
    once, twice = in_state(name, "frozen"), in_state(name, "frozen")
    layer = next(iter(HEADS[name]))
    zp.prune_heads(once, {layer: [0, 2, 3]})
    zp.prune_heads(twice, {layer: [2]})
    zp.prune_heads(twice, {layer: [0, 2, 3]})  # 2 is gone already
    assert torch.equal(outputs(once), outputs(twice))
    assert once.config.pruned_heads == twice.config.pruned_heads == {layer: [0, 2, 3]}
    again = zp.prune_heads(once, {layer: [3]})
    assert again.changes == ()


def test_static_ranges_and_integer_activations_stay(tmp_path):
    model = in_state("llama", "live", "int8", activations="int8")
    with zp.calibrate(model):
        outputs(model)
    zp.freeze(model)
    scale = model.model.layers[0].self_attn.o_proj.input_scale.clone()
    with silenced(model, {0: [0, 1]}):
        expected = outputs(model)
    zp.prune_heads(model, {0: [0, 1]})
    assert torch.equal(model.model.layers[0].self_attn.o_proj.input_scale, scale)
    assert torch.allclose(outputs(model), expected, atol=1e-5)
    zp.save(model, tmp_path / "m")
    assert torch.equal(outputs(zp.load(tmp_path / "m")[0]), outputs(model))


def test_a_pruned_model_goes_on(tmp_path):
    """Quantized, trained, copied, dequantized, quantized while it loads, by transformers alone."""
    model = build("t5-tied")
    zp.prune_heads(model, T5)
    model.save_pretrained(tmp_path / "float")
    expected = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), expected)
    loaded, _ = zp.load(tmp_path / "float", weights="int8")
    zp.quantize(model, "int8")
    zp.freeze(model)
    assert torch.equal(outputs(loaded), outputs(model))
    zp.save(model, tmp_path / "frozen")
    import transformers

    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "frozen").eval()
    assert torch.equal(outputs(plain), outputs(model))
    zp.compress(tmp_path / "float", tmp_path / "streamed", weights="int8")
    assert torch.equal(outputs(zp.load(tmp_path / "streamed")[0]), outputs(model))
    zp.dequantize(model)
    assert torch.allclose(outputs(model), expected, atol=0.2 * expected.abs().max())
    inputs = example_inputs(model)
    model(**inputs, labels=inputs["decoder_input_ids"].contiguous()).loss.backward()
    assert model.encoder.block[0].layer[0].SelfAttention.q.weight.grad.any()


def test_a_cache_of_fixed_size_has_room_for_fewer_heads():
    model = build("t5-tied")
    expected = None
    with silenced(model, T5):
        expected = continuation(model)
    zp.prune_heads(model, T5)
    assert torch.equal(continuation(model), expected)
    model.generation_config.cache_implementation = "static"
    model.generation_config.disable_compile = True
    assert torch.equal(continuation(model), expected)


def test_the_skeleton_of_a_pruned_checkpoint_has_its_shapes(tmp_path):
    model = build("llama")
    zp.prune_heads(model, {0: [2, 3]})
    model.save_pretrained(tmp_path)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert {n: p.shape for n, p in float_skeleton(tmp_path).named_parameters()} == shapes
    assert json.loads((tmp_path / "config.json").read_text())["num_attention_heads"] == 4
    base, _ = zp.load(tmp_path, task="feature-extraction")
    assert torch.equal(
        base.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight
    )


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - {"mistral"}))
def test_layers_are_numbered_where_a_number_is_enough(name):
    labels = [a.label for a in attentions(build(name))]
    if name in ("t5", "t5-tied", "whisper"):
        assert len(labels) == 6 and all(isinstance(label, str) for label in labels)
    else:
        assert labels == [0, 1]


@pytest.mark.parametrize(
    ("name", "heads", "message"),
    [
        ("gpt2", {2: [0]}, "^there is no layer 2; known: '0', '1'"),
        ("t5", {0: [0]}, "^there is no layer 0; .*encoder.block.0.layer.0.SelfAttention"),
        ("gpt2", {0: [4]}, "^layer 0 has no head 4; it had 0 to 3"),
        ("gpt2", {0: [-1]}, "^layer 0 has no head -1; it had 0 to 3"),
        ("gpt2", {0: [True]}, "^layer 0 has no head True"),
        ("gpt2", {0: 2}, r"^layer 0: 2 is not a list of heads; write \[2\]"),
        ("gpt2", {0: [1.0]}, r"^layer 0 has no head 1\.0"),
        ("gpt2", {0: [0, 1, 2, 3]}, "^layer 0 would lose all of its 4 heads; keep one"),
        ("llama", {1: [0, 1, 2]}, "^layer 1: heads 2, 3 share a key and value head; prune all"),
    ],
)
def test_a_refused_call_changes_nothing(name, heads, message):
    model = build(name)
    before = outputs(model)
    with pytest.raises(RecipeError, match=message):
        zp.prune_heads(model, {1: [0, 1], **heads} if name != "t5" else heads)
    assert torch.equal(outputs(model), before) and not hasattr(model.config, "pruned_heads")


def test_a_model_without_known_attention_is_refused_with_what_is_known():
    with pytest.raises(StateError, match=r"^Perceptron has no att.*q_proj, k_proj.*GPT2Attention"):
        zp.prune_heads(perceptron(), {0: [1]})


class Odd(nn.Module):
    """Attention by the names of its projections."""

    def __init__(self, rows: int = 64) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, rows) for _ in range(3))
        self.o_proj = nn.Linear(rows, 64)
        self.head_dim = 16

    def forward(self, x):
        return x


def with_norm(odd):
    odd.q_norm = nn.LayerNorm(64)


def with_frozen_gate(odd):
    odd.gate = nn.ModuleList([nn.Linear(64, 64)])
    zp.quantize(odd, "int8", include="gate.*")
    zp.freeze(odd)


def with_sinks(odd):
    odd.sinks = nn.Parameter(torch.zeros(4))


def without_width(odd):
    del odd.head_dim


def with_another_projection(odd):
    odd.q_proj = nn.Bilinear(4, 4, 64)


class ReadsWidth(Odd):
    def forward(self, x):
        return x.view(-1, self.embed_dim)


class ReadsConfig(Odd):
    def forward(self, x):
        return x.view(-1, self.config.num_attention_heads)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (Odd, with_norm, "it holds q_norm, whose weights may belong to heads"),
        (Odd, with_frozen_gate, "it holds gate, whose weights may belong to heads"),
        (Odd, with_sinks, "it holds sinks, which may belong to heads"),
        (Odd, without_width, "it does not say how wide a head is: none of head_dim, attention_h"),
        (Odd, with_another_projection, "a projection is a Bilinear"),
        (lambda: Odd(56), lambda odd: None, "its projections are not of whole heads"),
        (ReadsWidth, lambda odd: None, "its forward reads embed_dim, the width of all heads"),
        (
            ReadsConfig,
            lambda odd: None,
            "its forward reads num_attention_heads from the configuration",
        ),
    ],
)
def test_attention_that_is_not_understood_is_refused(kind, change, message):
    odd = kind()
    change(odd)
    with pytest.raises(StateError, match=f"^0: heads of this .* cannot be pruned: {message}"):
        zp.prune_heads(nn.Sequential(odd), {0: [1]})


@pytest.mark.parametrize(
    ("pruned", "message"),
    [
        ({"0": [9]}, "layer 0 has no head 9; it had 0 to 3"),
        ({"1": [0, 1, 2, 3]}, "layer 1 would lose all of its 4 heads"),
        ([0], "list"),
    ],
)
def test_a_configuration_that_cannot_be_right_is_refused(pruned, message, tmp_path):
    model = in_state("gpt2", "frozen")
    model.config.pruned_heads = pruned
    zp.save(model, tmp_path / "m")
    with pytest.raises(
        CheckpointError, match=rf"^pruned_heads=.* in the configuration: .*{message}"
    ):
        zp.load(tmp_path / "m")


def test_learned_scales_are_refused():
    model = build("bert")
    scheme = Scheme(format="int8", learned_scale=True)
    zp.quantize(model, recipe=Recipe(rules=(Rule(match="*", scheme=scheme),)))
    with pytest.raises(StateError, match="scales are learned; prune before zp.quantize, or after"):
        zp.prune_heads(model, {0: [1]})


def test_heads_that_share_a_code_are_refused():
    config = transformers.BertConfig(
        hidden_size=48, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64
    )
    model = transformers.BertModel(config)
    zp.quantize(model, "e8p", group_size=16)
    with pytest.raises(StateError, match="codes stand for 8 values together, and heads have 12"):
        zp.prune_heads(model, {0: [1]})


def test_heads_of_whole_codes_go():
    model = in_state("llama", "frozen", "e8p", group_size=16)
    kept = copy.deepcopy(model)
    zp.prune_heads(model, HEADS["llama"])
    with silenced(kept, HEADS["llama"]):
        torch.testing.assert_close(outputs(model), outputs(kept), rtol=1e-4, atol=1e-5)


def test_norms_of_single_heads_are_left_alone():
    odd = Odd()
    odd.q_norm = nn.LayerNorm(16)
    model = nn.Sequential(odd)
    zp.prune_heads(model, {0: [1]})
    assert odd.q_proj.out_features == 48 == odd.o_proj.in_features and odd.pruned_heads == (1,)
