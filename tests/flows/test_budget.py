"""A number of bytes in, the recipe that loses least in them out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeropoint as zp
from tests.models import build, llama
from zeropoint.errors import (
    GroupSizeError,
    NonFiniteError,
    RecipeError,
    TextError,
    UnknownNameError,
    UnusedRuleError,
)
from zeropoint.flows import budget as module
from zeropoint.flows.budget import recipe_of, schemes_of
from zeropoint.model.walk import weight_sites
from zeropoint.scheme import Rule, Scheme

from .cases import INT4, INT8, actions, refused, snapshot

FORMATS = ("int2", "int4", "int8")
FEW = zp.Calibration(tokens=128, window=16)


def ids(rows=8, seed=0):
    return torch.randint(2, 99, (rows, 16), generator=torch.Generator().manual_seed(seed))


def spend(model, budget, **options):
    options = {"formats": FORMATS, "data": ids(), "calibration": FEW} | options
    return zp.quantize(model, budget=budget, **options)


def bytes_at(name, weights):
    model = build(name)
    zp.quantize(model, weights, strict=False)
    zp.freeze(model)
    return zp.footprint(model).total_bytes


# --- the budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
def test_the_whole_model_fits_and_the_report_says_what_that_costs(name):
    """Tied, transposed, and without logits. 29. of accuracy.md: in the bytes really held."""
    model = build(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    budget = int(0.2 * zp.footprint(model).total_bytes)
    report = spend(model, budget)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "live: untouched"
    zp.freeze(model, "mse")
    held = zp.footprint(model).total_bytes
    assert report.budget_bytes == budget and report.bytes_after == held
    assert 0.9 * budget < held <= budget
    losses = (report.predicted_kl, report.measured_kl), (report.predicted_error,) * 2
    logits = name != "bert"
    assert (losses[0][0] is not None) == (losses[0][1] is not None) == logits
    assert (losses[1][0] is not None) == (not logits)
    assert "budget 0.1 MB: predicted loss " in str(report)


def test_predicted_and_measured_agree_where_errors_are_small():
    """33. of accuracy.md. Random weights hardly interact: to a quarter at 4 and 8 bits."""
    report = spend(build("llama"), bytes_at("llama", "int4"), formats=("int4", "int8"))
    assert report.predicted_kl == pytest.approx(report.measured_kl, rel=0.25)


def test_second_order_alone_predicts_what_is_measured(monkeypatch):
    """Before any scaling by measurements: Fisher's diagonal from 64 windows, to a third."""
    found = {}
    scaled = module._scaled

    def spy(work, items, choice):
        found["predicted"] = module.totals([item.options for item in items], choice).loss
        found["measured"] = module._measure(work, module._chosen(items, choice))
        return scaled(work, items, choice)

    monkeypatch.setattr(module, "_scaled", spy)
    use = zp.Calibration(tokens=1024, window=16)
    spend(build("llama"), bytes_at("llama", "int4"), data=ids(64), calibration=use)
    assert found["predicted"] == pytest.approx(found["measured"], rel=1 / 3)


def test_a_smaller_budget_than_anything_takes_is_refused_with_the_least():
    least = spend(build("llama"), "1GB", formats="int2").bytes_after
    with pytest.raises(RecipeError, match=rf"the smallest choice takes {least:,} bytes"):
        spend(build("llama"), least - 1)
    assert spend(build("llama"), least).bytes_after == least


def test_a_large_budget_buys_the_widest_formats():
    model = build("llama")
    spend(model, "1GB")
    assert set(actions(model).values()) == {"int8 per channel"}


class Unequal(nn.Module):
    """Two layers, of which one hardly speaks."""

    def __init__(self):
        super().__init__()
        self.quiet, self.loud = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.loud(x) + 0.01 * self.quiet(x.relu())


def test_bytes_go_where_the_loss_is():
    data = [torch.randn(8, 64, generator=torch.Generator().manual_seed(0))]
    least = zp.quantize(Unequal(), budget="1MB", formats="int2", data=data).bytes_after
    small, large = (Scheme.of(name).storage_bytes((64, 64)) for name in ("int2", "int8"))
    model = Unequal()
    zp.quantize(model, budget=least + large - small, formats=("int2", "int8"), data=data)
    assert actions(model) == {"quiet": "int2 g32 asymmetric", "loud": "int8 per channel"}


# --- what shares a choice -------------------------------------------------------------------------


def test_layers_of_one_input_and_tied_weights_share_a_choice():
    model = build("llama-tied")
    spend(model, int(0.22 * zp.footprint(model).total_bytes))
    found = actions(model)
    assert len(set(found.values())) > 1
    for layer in ("model.layers.0", "model.layers.1"):
        assert len({found[f"{layer}.self_attn.{n}_proj"] for n in "qkv"}) == 1
        assert len({found[f"{layer}.mlp.{n}_proj"] for n in ("gate", "up")}) == 1
    assert found["model.embed_tokens"] == found["lm_head"]


def test_embeddings_and_heads_keep_four_bits_unless_asked():
    model = build("llama")
    least = spend(build("llama"), "1GB", formats="int2").bytes_after
    with pytest.raises(RecipeError, match="nothing fits"):
        spend(build("llama"), least, formats=None)
    spend(model, int(1.25 * least), formats=None)
    found = actions(model)
    assert {found["model.embed_tokens"], found["lm_head"]} <= {
        str(s) for s in module.DEFAULT_FORMATS if s.fmt.bits >= 4
    }


def test_what_the_data_does_not_reach_counts_as_average_and_is_said():
    model = build("bert")
    report = spend(model, int(0.2 * zp.footprint(model).total_bytes))
    assert [w for w in report.warnings if "such as pooler.dense, do not show in" in w]


# --- the recipe -----------------------------------------------------------------------------------


def test_the_recipe_gives_the_same_bytes_again(tmp_path):
    model, again = build("llama-tied"), build("llama-tied")
    report = spend(model, int(0.2 * zp.footprint(model).total_bytes), exclude="*.0.mlp.up_proj")
    report.recipe.save(tmp_path / "recipe.yaml")
    second = zp.quantize(again, recipe=zp.Recipe.load(tmp_path / "recipe.yaml"))
    assert second.recipe == report.recipe and second.bytes_after == report.bytes_after
    for m in (model, again):
        zp.freeze(m, "mse")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert actions(again)["model.layers.0.mlp.up_proj"] == "float"


def test_layers_that_agree_are_one_rule():
    sites = {site.name: site for site in weight_sites(llama(layers=3))}
    schemes = dict.fromkeys(sites.values(), INT4)
    alike = recipe_of(schemes, ())
    assert Rule(match="model.layers.*.mlp.down_proj", scheme=INT4) in alike.rules
    assert len(alike.rules) == 9, "seven places in a layer, an embedding, a head"
    for name in ("gate", "up", "down"):
        schemes[sites[f"model.layers.1.mlp.{name}_proj"]] = INT8
    schemes[sites["model.layers.0.self_attn.o_proj"]] = INT8
    first, second, *rest = recipe_of(schemes, ()).rules
    assert first == Rule(match="model.layers.0.self_attn.o_proj", scheme=INT8)
    assert second == Rule(match="model.layers.1.mlp.*", scheme=INT8)
    assert {rule.scheme for rule in rest} == {INT4} and len(rest) == 9


def test_formats_are_names_or_schemes_each_once():
    g16 = Scheme.of("int4", group_size=16)
    assert schemes_of(["int8", g16, "int8"]) == (INT8, g16)
    assert schemes_of("int8") == schemes_of(INT8) == (INT8,)
    assert schemes_of(None) is None
    model = build("llama")
    spend(model, "1GB", formats=[g16])
    assert set(actions(model).values()) == {"int4 g16 asymmetric"}


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"budget": "much"}, RecipeError, "'much' is no size"),
        ({"budget": "1MB", "weights": "int4"}, RecipeError, "leave weights out, or name Schemes"),
        ({"budget": "1MB", "formats": []}, RecipeError, "leaves nothing to choose from"),
        ({"budget": "1MB", "formats": ["int9"]}, UnknownNameError, "'int9' is not a format"),
        ({"formats": ["int4"]}, RecipeError, "formats: only a budget needs that; give budget="),
        ({"data": ["text"]}, RecipeError, "data: only a budget needs that"),
        ({"budget": "1MB", "exclude": "x"}, UnusedRuleError, "'x' matched no module"),
        ({"budget": "1MB", "data": ["some text"]}, TextError, "need a tokenizer"),
        (
            {"budget": "1MB", "formats": [Scheme.of("int4", group_size=48)]},
            GroupSizeError,
            "K=64 is not a multiple of group_size=48.*or add a format per channel",
        ),
    ],
)
def test_refused(options, error, match):
    refused(build("llama"), error, match, **options)


def test_a_model_that_overflows_is_refused_and_left_as_it_was():
    model = build("llama")
    model.model.norm.weight.data.fill_(float("inf"))
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match="the model answers with NaN or Inf on this data"):
        spend(model, "1GB")
    assert snapshot(model) == before


def test_gradients_that_overflow_are_refused():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x):
            return self.layer(x) + (0 * self.layer.weight.sum()).sqrt()  # slope 0 * inf

    with pytest.raises(NonFiniteError, match="layer.weight: its gradient has NaN or Inf"):
        zp.quantize(Steep(), budget="1MB", data=[torch.ones(2, 32)])


def test_the_loss_of_a_broken_candidate_is_refused(monkeypatch):
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(module, "distance", lambda *_: nan)
    with pytest.raises(NonFiniteError, match="quantized model answers with NaN or Inf"):
        spend(build("llama"), "1GB")


def test_data_that_no_weight_answers_to_is_refused():
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.bias = nn.Parameter(torch.ones(32))

        def forward(self, x):
            return x + self.bias + 0 * self.layer(x)

    with pytest.raises(RecipeError, match="does not depend on any weight that could be chosen"):
        zp.quantize(Deaf(), budget="1MB", data=[torch.ones(2, 32)])


def test_gradients_and_training_state_of_the_user_survive():
    model = build("llama").train()
    model.lm_head.requires_grad_(False)
    parameter = model.model.layers[0].mlp.up_proj.weight
    parameter.grad = kept = torch.ones_like(parameter)
    spend(model, "1GB")
    assert parameter.grad is kept and model.model.norm.weight.grad is None
    assert model.training and not model.lm_head._parameters["weight"].requires_grad


def test_the_same_seed_finds_the_same_recipe():
    reports = [spend(build("llama"), bytes_at("llama", "int4")) for _ in range(2)]
    assert reports[0] == reports[1]
