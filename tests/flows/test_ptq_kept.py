"""What cannot be quantized: kept with the reason, or refused, and never half done."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import zeropoint as zp
from zeropoint.errors import CoverageError, NonFiniteError, UnusedRuleError
from zeropoint.scheme import Recipe, Rule

from .cases import INT8, Block, refused

# --- what cannot be quantized ---------------------------------------------------------------------


class OwnLinear(nn.Linear):
    """Reads its weight in its own way."""

    def forward(self, x):
        return super().forward(x) + self.weight.sum()


class Bare(nn.Module):
    """A matrix in no layer."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, 32))
        self.layer = nn.Linear(32, 32)


def test_a_subclass_of_linear_is_kept_with_the_reason():
    model = nn.Sequential(nn.Linear(128, 128), OwnLinear(32, 4))
    x = torch.randn(2, 32)
    expected = model[1](x)
    report = zp.quantize(model)
    assert [(m.name, m.action) for m in report.modules] == [("0", "quantized"), ("1", "kept")]
    assert report.kept[0].reason == (
        "OwnLinear is a subclass of Linear and may read its weight in its own way"
    )
    assert type(model[1]) is OwnLinear and torch.equal(model[1](x), expected)


def test_an_embedding_with_options_of_its_own_is_kept_with_the_reason():
    model = nn.Sequential(nn.Linear(128, 128), nn.Embedding(4, 32, max_norm=1.0))
    report = zp.quantize(model)
    assert report.kept[0].reason == "Embedding with max_norm=1.0 is not supported"


def test_a_weight_that_is_small_already_is_kept_with_the_reason():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(32, 32))
    model[1].weight = nn.Parameter(model[1].weight.to(torch.float8_e4m3fn), requires_grad=False)
    report = zp.quantize(model)
    assert report.kept[0].reason == "its weight is torch.float8_e4m3fn already"


def test_an_empty_weight_is_kept_with_the_reason():
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 4)
    report = zp.quantize(nn.Sequential(nn.Linear(32, 32), empty))
    assert report.kept[0].reason == "its weight is empty"


def bare(rows: int) -> nn.Module:
    return nn.Sequential(Bare(rows))


def test_a_matrix_of_an_unknown_module_is_kept_with_the_reason_and_counts_as_not_covered():
    small = zp.quantize(bare(1))
    assert [(m.name, m.reason) for m in small.kept] == [("0", "no quantized counterpart of Bare")]
    assert small.coverage == 32 / 33
    message = (
        r"9\.1% of the weights that no rule keeps would be quantized, the recipe promises at least "
        r"90\.0%: 0 \(10,240 elements\): no quantized counterpart of Bare\. Exclude them, "
        "lower min_coverage, or use strict=False"
    )
    refused(bare(320), CoverageError, message)
    report = zp.quantize(bare(320), strict=False)
    assert report.coverage == 32 / 352 and report.warnings[0].startswith("9.1%")


def test_a_model_that_itself_owns_a_matrix_is_quantized_but_for_it():
    """Many vision transformers: position embeddings are a parameter of the model."""
    report = zp.quantize(Bare(1))
    assert [(m.name, m.action) for m in report.modules] == [("", "kept"), ("layer", "quantized")]
    assert report.kept[0].reason == "no quantized counterpart of Bare"


def test_attention_that_cannot_be_quantized_breaks_the_promise_of_coverage():
    model = nn.Sequential(nn.MultiheadAttention(64, 4), nn.Linear(64, 64))
    message = (
        r"20\.0% of the weights.*0 \(12,288 elements\): no quantized counterpart of "
        r"MultiheadAttention; 0\.out_proj \(4,096 elements\): NonDynamicallyQuantizableLinear is a "
        "subclass of Linear"
    )
    refused(model, CoverageError, message)
    report = zp.quantize(model, exclude=["0", "0.*"])
    assert report.coverage == 0.2 and report.warnings == ()


def test_convolutions_break_the_promise_of_coverage():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(64, 10))
    refused(model, CoverageError, r"1 \(36,864 elements\): no quantized counterpart of Conv2d")
    only = nn.Sequential(nn.Conv2d(3, 8, 3))
    refused(
        only,
        UnusedRuleError,
        r"include='\*' finds no module to quantize; 0: no quantized counterpart of Conv2d",
    )


def test_a_recipe_that_quantizes_nothing_is_refused():
    recipe = Recipe(rules=(Rule(match="*"),))
    message = r"nothing would be quantized: rule '\*' keeps it"
    refused(Block(), CoverageError, message, recipe=recipe)


def test_the_promise_can_be_lowered_but_not_to_nothing():
    rules = (Rule(match="*", scheme=INT8),)
    report = zp.quantize(bare(320), recipe=Recipe(rules=rules, min_coverage=0.05))
    assert report.coverage == 32 / 352 and report.warnings == ()
    recipe = Recipe(rules=(Rule(match="0.layer"),), min_coverage=0.0)
    message = "nothing would be quantized: no rule matches; rule '0.layer' keeps it"
    refused(bare(320), CoverageError, message, recipe=recipe)


def test_a_linear_whose_weight_is_computed_does_not_leave_the_model_half_changed():
    """Pruning and old weight norm: the weight is no parameter, so it cannot be replaced."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    nn.utils.prune.random_unstructured(model[1], "weight", 0.5)
    report = zp.quantize(model)
    assert [(m.name, m.action) for m in report.modules] == [("0", "quantized"), ("1", "kept")]
    assert report.kept[0].reason and "Linear" in report.kept[0].reason
    assert type(model[1]) is nn.Linear and hasattr(model[1], "weight_orig")


# --- weights that cannot be stored ----------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weights", ["int8", "int4", "nf4", "bfloat16"])
def test_a_non_finite_weight_is_refused_by_name(weights, value):
    model = Block()
    with torch.no_grad():
        model.down.weight[3, 7] = value
    kind = "1 NaN and 0 Inf" if value != value else "0 NaN and 1 Inf"
    message = rf"^down\.weight: {kind} among 8192 values, the first at \[3, 7\]; repair"
    refused(model, NonFiniteError, message, weights=weights)
    zp.quantize(model, weights, exclude="down")
    zp.freeze(model)
