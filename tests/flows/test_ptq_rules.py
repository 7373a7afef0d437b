"""Which module gets which scheme: patterns, recipes, roles, ties, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import zeropoint as zp
from tests.models import PERCEPTRON_INPUT, build, outputs, perceptron
from zeropoint.errors import (
    GroupSizeError,
    RecipeError,
    ScaleRangeError,
    UnknownNameError,
    UnusedRuleError,
)
from zeropoint.nn import QConv1D, QModule
from zeropoint.scheme import Recipe, Rule, Scheme

from .cases import INT4, INT8, Block, actions, refused

# --- which rule decides ---------------------------------------------------------------------------


def test_by_default_linears_get_the_format_and_embeddings_and_heads_int8_per_row():
    model = build("llama")
    report = zp.quantize(model, "int4")
    found = actions(model)
    assert found.pop("model.embed_tokens") == found.pop("lm_head") == "int8 per channel"
    assert set(found.values()) == {"int4 g32 asymmetric"} and len(found) == 14
    assert report.coverage == 1.0 and report.kept == () and report.warnings == ()


@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
def test_a_downcast_is_for_embeddings_and_heads_too(weights):
    model = build("llama")
    zp.quantize(model, weights)
    assert set(actions(model).values()) == {weights}


def test_without_arguments_weights_are_int8():
    model = Block()
    zp.quantize(model)
    assert set(actions(model).values()) == {"int8 per channel"}


def test_group_size_and_symmetry_are_for_linears():
    model = build("llama")
    zp.quantize(model, "int4", group_size=16, symmetric=True)
    found = actions(model)
    assert found.pop("model.embed_tokens") == found.pop("lm_head") == "int8 per channel"
    assert set(found.values()) == {"int4 g16"}


def test_group_size_minus_one_is_one_scale_per_channel():
    model = Block()
    zp.quantize(model, "int4", group_size=-1)
    assert set(actions(model).values()) == {"int4 per channel asymmetric"}


def test_include_takes_only_what_it_matches():
    model = Block()
    report = zp.quantize(model, "int4", include="attention.*")
    assert actions(model) == {
        "attention.q": "int4 g32 asymmetric",
        "attention.v": "int4 g32 asymmetric",
        "up": "float",
        "down": "float",
    }
    assert [(m.name, m.reason) for m in report.kept] == [
        ("up", "no rule matches"),
        ("down", "no rule matches"),
    ]


def test_exclude_wins_over_include():
    model = Block()
    report = zp.quantize(model, "int8", include=["attention.*", "up"], exclude=["*.v"])
    assert [n for n, a in actions(model).items() if a != "float"] == ["attention.q", "up"]
    assert {m.name: m.reason for m in report.kept}["attention.v"] == "rule '*.v' keeps it"


def test_the_first_rule_that_matches_decides():
    rules = (
        Rule(match="attention.v"),
        Rule(match="attention.*", scheme=INT4),
        Rule(match="*", scheme=INT8),
    )
    model = Block()
    report = zp.quantize(model, recipe=Recipe(rules=rules))
    assert actions(model) == {
        "attention.q": "int4 g32 asymmetric",
        "attention.v": "float",
        "up": "int8 per channel",
        "down": "int8 per channel",
    }
    assert report.recipe.rules == rules


def test_a_rule_with_a_role_speaks_only_of_it():
    rules = (
        Rule(match="*", role="embedding"),
        Rule(match="*", role="head", scheme=INT8),
        Rule(match="*", scheme=INT4),
    )
    model = build("llama")
    zp.quantize(model, recipe=Recipe(rules=rules))
    found = actions(model)
    assert found.pop("model.embed_tokens") == "float" and found.pop("lm_head") == "int8 per channel"
    assert set(found.values()) == {"int4 g32 asymmetric"}


def test_a_module_that_no_rule_matches_is_kept():
    recipe = Recipe(rules=(Rule(match="up", scheme=INT8), Rule(match="d*", scheme=INT8)))
    model = Block()
    report = zp.quantize(model, recipe=recipe)
    assert [m.name for m in report.kept] == ["attention.q", "attention.v"]
    assert report.coverage == 2 * 64 * 128 / (2 * 64 * 64 + 2 * 64 * 128)


def test_a_recipe_and_arguments_together_are_refused():
    message = "give either a recipe, or weights / group_size / .* / exclude; not "
    recipe = Recipe(rules=(Rule(match="*", scheme=INT8),))
    for arguments in (
        {"weights": "int8"},
        {"group_size": 32},
        {"symmetric": False},
        {"include": "*"},
        {"exclude": "up"},
    ):
        refused(Block(), RecipeError, message, recipe=recipe, **arguments)


def test_an_unknown_format_is_refused_with_the_nearest():
    refused(Block(), UnknownNameError, "'int9' is not a format; close: 'int8'", weights="int9")


def test_a_scheme_for_weights_is_refused_with_what_to_write():
    message = "int4 g32 asymmetric is a Scheme, .*; write weights='int4', with options such as "
    refused(Block(), RecipeError, message, weights=Scheme.of("int4"))


# --- rules that decide nothing --------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_with_close_names(argument):
    refused(Block(), UnusedRuleError, "'dwon'.* close: 'down'", **{argument: "dwon"})


def test_including_a_container_says_how_to_write_it():
    message = r"include='attention' finds no module to quantize.*write 'attention\.\*'"
    refused(Block(), UnusedRuleError, message, include=["attention"])


def test_an_empty_list_of_patterns_is_refused():
    refused(Block(), UnusedRuleError, "empty list of patterns matches nothing", include=[])
    refused(Block(), UnusedRuleError, "empty list of patterns matches nothing", exclude=())


def test_an_include_that_others_have_taken_is_refused():
    message = "include='up' finds no module.*other patterns take everything it matches"
    refused(Block(), UnusedRuleError, message, include="up", exclude="up")
    refused(Block(), UnusedRuleError, message, include=["*", "up"])


def test_an_include_of_what_cannot_be_quantized_is_refused_with_the_reason():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(32, 32))
    message = "include='0' finds no module.* 0: no quantized counterpart of Conv2d"
    refused(model, UnusedRuleError, message, include="0")


def test_a_model_without_matrices_is_refused():
    model = nn.Sequential(nn.LayerNorm(8), nn.ReLU())
    refused(model, UnusedRuleError, "the model has no weight matrices")
    recipe = Recipe(rules=(Rule(match="x", scheme=INT8),))
    refused(
        model, UnusedRuleError, "matched no module; the model has no weight matrices", recipe=recipe
    )


def test_a_recipes_rule_that_matches_nothing_is_refused():
    rules = (Rule(match="lm_hed"), Rule(match="*", scheme=INT8))
    message = "rule 'lm_hed' matched no module; close: 'lm_head'"
    refused(build("llama"), UnusedRuleError, message, recipe=Recipe(rules=rules))


def test_a_recipes_rule_behind_another_is_refused():
    rules = (Rule(match="*", scheme=INT8), Rule(match="up", scheme=INT4))
    message = "rule 'up' decides nothing: .*an earlier rule takes them all"
    refused(Block(), UnusedRuleError, message, recipe=Recipe(rules=rules))


def test_a_recipes_rule_for_what_cannot_be_quantized_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(32, 32))
    rules = (Rule(match="0", scheme=INT8), Rule(match="1", scheme=INT8))
    message = "rule '0' decides nothing: .*none of them can be quantized"
    refused(model, UnusedRuleError, message, recipe=Recipe(rules=rules))


def test_a_role_that_no_module_has_is_refused():
    rules = (Rule(match="*", role="embedding", scheme=INT8), Rule(match="*", scheme=INT8))
    message = r"rule '\*' \(embedding\) matched no module"
    refused(Block(), UnusedRuleError, message, recipe=Recipe(rules=rules))


def test_not_strict_turns_refusals_into_warnings():
    model = Block(k=48)
    report = zp.quantize(model, "int4", exclude="dwon", strict=False)
    assert [w.split(":")[0] for w in report.warnings] == [
        "rule 'dwon' matched no module; close",
        "attention.q",
        "attention.v",
        "72.7% of the weights that no rule keeps would be quantized, "
        "the recipe promises at least 90.0%",
    ]
    assert actions(model)["attention.q"] == "float" and actions(model)["up"] != "float"
    assert "K=48 is not a multiple of group_size=32" in report.kept[0].reason


# --- group sizes ----------------------------------------------------------------------------------


def test_a_group_size_that_does_not_divide_k_is_refused_with_module_and_remedies():
    message = (
        r"^attention\.q: K=48 is not a multiple of group_size=32; use group_size=\d+.*"
        r"per channel.*exclude"
    )
    refused(Block(k=48), GroupSizeError, message, weights="int4")
    excluded = Block(k=48)
    zp.quantize(excluded, "int4", exclude="attention.*")
    zp.quantize(Block(k=48), "int4", group_size=-1)
    zp.quantize(Block(k=48), "int4", group_size=16)


@pytest.mark.parametrize("size", [0, -2, 32.0, True])
def test_a_group_size_that_is_no_size_is_refused(size):
    refused(Block(), RecipeError, f"group_size={size!r} is not a positive", group_size=size)


# --- tied weights ---------------------------------------------------------------------------------


def test_excluding_one_end_of_a_tied_weight_keeps_the_other_with_the_reason():
    model = perceptron()
    report = zp.quantize(model, "int8", exclude="head")
    assert actions(model)["embed"] == actions(model)["head"] == "float"
    assert model.embed.weight is model.head.weight
    reasons = {m.name: m.reason for m in report.kept}
    assert reasons["head"] == "rule 'head' keeps it"
    assert reasons["embed"] == "tied to head, which is kept: rule 'head' keeps it"


def test_two_schemes_for_one_tied_weight_are_refused():
    rules = (Rule(match="head", scheme=INT4), Rule(match="*", scheme=INT8))
    message = (
        "embed and head are one tied weight, but the rules give int8 per channel and "
        "int4 g32 asymmetric; give both one scheme"
    )
    refused(perceptron(), RecipeError, message, recipe=Recipe(rules=rules))


def test_a_tied_weight_counts_once_in_the_report():
    report = zp.quantize(perceptron(), "int8")
    rows = {m.name: m for m in report.modules}
    assert rows["head"].action == "quantized" and rows["head"].reason == "tied to embed"
    assert rows["head"].bytes_before == rows["head"].bytes_after == 0
    assert rows["embed"].bytes_before == 11 * 64 * 4 and rows["embed"].bytes_after == 11 * 68
    assert report.coverage == 1.0


# --- module types ---------------------------------------------------------------------------------


def test_conv1d_is_quantized_along_its_inputs():
    model = nn.Sequential(Conv1D(96, 64))
    with torch.no_grad():
        model[0].weight[:, 5] *= 100  # one output with large weights must not spoil the others
    x = torch.randn(3, 64)
    expected = model(x)
    zp.quantize(model, "int8")
    zp.freeze(model)
    assert type(model[0]) is QConv1D and model[0].weight.shape == (96, 64)
    assert model[0].weight.scale.shape == (96, 1)
    # Each weight is off by at most half a step of its own output, and by float32 rounding.
    bound = x.abs().sum(-1, keepdim=True) * model[0].weight.scale.t() / 2
    rounding = 2 * 64 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert ((model(x) - expected).abs() <= bound + rounding).all()
    assert not torch.equal(model(x), expected)


def test_a_module_under_two_names_is_replaced_at_both():
    model = Block()
    model.again = model.up
    report = zp.quantize(model)
    assert isinstance(model.up, QModule) and model.again is model.up
    assert [m.name for m in report.modules] == ["attention.q", "attention.v", "up", "down"]
    zp.freeze(model)
    zp.dequantize(model)
    assert type(model.up) is nn.Linear and model.again is model.up


def test_any_name_of_a_module_can_be_meant():
    model = Block()
    model.again = model.up
    report = zp.quantize(model, exclude="again")
    assert [m.name for m in report.kept] == ["up"] and type(model.again) is nn.Linear


def test_a_part_of_a_model_can_be_quantized_on_its_own():
    model = Block()
    zp.quantize(model.attention, "int8")
    zp.freeze(model)
    assert [n for n, a in actions(model).items() if a != "float"] == ["attention.q", "attention.v"]


def test_the_live_output_is_near_the_original():
    model = perceptron()
    expected = model(PERCEPTRON_INPUT)
    zp.quantize(model)
    error = (model(PERCEPTRON_INPUT) - expected).norm() / expected.norm()
    assert 0 < error < 0.02


def test_a_weight_beyond_float16_is_refused_by_name():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = -7e4
    refused(
        model,
        ScaleRangeError,
        r"^model.layers.1.mlp.down_proj.weight: 70000 does not fit float16, .* 65504; use bfloat16",
        weights="float16",
    )
    zp.quantize(model, weights="bfloat16")


MIXED = Recipe(
    rules=(
        Rule(match="*", role="linear", scheme=Scheme.of("int8")),
        Rule(match="*", scheme=Scheme.of("bfloat16")),
    )
)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "bert", "gpt2", "t5"])
def test_linears_in_int8_and_the_rest_in_bfloat16(name):
    model = build(name)
    expected = outputs(model)
    report = zp.quantize(model, recipe=MIXED)
    zp.freeze(model)
    schemes = {
        m.scheme.format for m in model.modules() if isinstance(m, QModule) and m.role == "linear"
    }
    assert schemes >= {"int8"}
    embeddings = [m for m in model.modules() if isinstance(m, QModule) and m.role == "embedding"]
    assert {m.scheme.format for m in embeddings} == {"bfloat16"}
    assert report.coverage == 1.0 and not report.kept
    error = (outputs(model) - expected).norm() / expected.norm()
    assert 0 < error < 0.05
