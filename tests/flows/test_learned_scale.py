"""Live modules whose grids are parameters: quantize -> train -> freeze."""

from __future__ import annotations

import copy

import pytest
import torch

import zeropoint as zp
from tests.models import PERCEPTRON_INPUT, llama, perceptron
from zeropoint.algorithms.search import search
from zeropoint.errors import NonFiniteError, RecipeError

pytestmark = pytest.mark.usefixtures("torch_kernel")

EVERYTHING = zp.Recipe.from_yaml(
    """
    rules:
      - {match: '*', weights: int4, learned_scale: true}
    """
)


FLOAT_ZEROS = zp.Recipe.from_yaml(
    """
    rules:
      - {match: '*', weights: int3, float_zero_point: true, learned_scale: true}
    """
)


SIGNED = zp.Recipe.from_yaml(
    """
    rules:
      - {match: '*', weights: int3, symmetric: true, learned_scale: true}
    """
)


def live(recipe=None, **options):
    model = perceptron()
    options = options or {"weights": "int3"}
    zp.quantize(model, **({"recipe": recipe} if recipe else options | {"learned_scale": True}))
    return model


def trained(model, steps=3):
    """A few steps of SGD, on a loss that reaches every parameter."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(PERCEPTRON_INPUT) - 1.0).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scales(model))
        optimizer.step()
    return model


def scales(model):
    return [p for n, p in model.named_parameters() if n.endswith("_scale")]


def test_scales_and_zero_points_are_parameters_that_start_on_the_best_grid():
    model, plain = live(), perceptron()
    found = search(plain.up.weight.detach(), zp.Scheme.of("int3"))
    state = model.state_dict()
    assert torch.equal(state["up.weight_scale"], found.scale.float())
    assert torch.equal(state["up.weight_zero_point"], found.zero_point.float())
    assert {"up.weight_scale", "up.weight_zero_point"} <= dict(model.named_parameters()).keys()
    assert "embed.weight_scale" not in state, "int8 per row, found anew at every forward"
    assert torch.equal(model.up.grid.scale, state["up.weight_scale"]) and model.embed.grid is None


@pytest.mark.parametrize(
    ("recipe", "scheme"),
    [
        (None, "int3 g32 asymmetric"),
        (EVERYTHING, "int4 g32 asymmetric"),
        (FLOAT_ZEROS, "int3 g32 float zero point"),
        (SIGNED, "int3 g32"),
    ],
    ids=["linear layers", "tables too", "float zero points", "scales of either sign"],
)
def test_freezing_stores_what_the_forward_used(tmp_path, recipe, scheme):
    model = trained(live(recipe))
    before = copy.deepcopy(model)
    y = model(PERCEPTRON_INPUT)
    images = {n: m.float_weight() for n, m in before.named_modules() if hasattr(m, "grid")}
    report = zp.freeze(model)
    # Only the order of sums in the product differs; the weights are the same bits.
    assert torch.allclose(model(PERCEPTRON_INPUT), y, rtol=0, atol=1e-5 * y.abs().max().item())
    for name in images:
        module = before.get_submodule(name)
        if module.grid is not None and name != "head":
            assert torch.equal(
                model.get_submodule(name).qweight.dequantize(),
                module.on_learned_grid().dequantize(),
            )
    assert str(model.up.scheme) == scheme
    assert not scales(model) or all(p.grad is None for p in scales(model))
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["up"] == "on the grid that was learned"
    zp.save(model, tmp_path / "out")
    again = perceptron()
    zp.load(tmp_path / "out", model=again)
    assert torch.equal(again(PERCEPTRON_INPUT), model(PERCEPTRON_INPUT))


def test_tied_weights_share_one_learned_grid():
    model = live(EVERYTHING)
    assert model.head.grid.scale is model.embed.grid.scale
    assert model.head.grid.zero_point is model.embed.grid.zero_point
    names = [n for n, _ in model.named_parameters()]
    assert "embed.weight_scale" in names and "head.weight_scale" not in names
    trained(model)
    zp.freeze(model)
    assert model.head.tied_to is model.embed


def test_training_changes_scales_weights_and_zero_points():
    model, before = live(EVERYTHING), live(EVERYTHING).state_dict()
    after = trained(model).state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert {"up.weight", "up.weight_scale", "embed.weight_scale"} <= changed


def test_a_learned_grid_keeps_float32_when_the_model_does_not():
    model = live().to(torch.bfloat16)
    assert model.up.weight.dtype == torch.bfloat16
    assert model.up.grid.scale.dtype == model.up.grid.zero_point.dtype == torch.float32
    assert model(PERCEPTRON_INPUT).dtype == torch.bfloat16


def test_dequantize_gives_the_float_weights_back():
    model, plain = live(), perceptron()
    zp.dequantize(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model(PERCEPTRON_INPUT), plain(PERCEPTRON_INPUT))


def test_another_algorithm_is_refused():
    with pytest.raises(RecipeError, match="up has learned its grid, and algorithm='mse' would"):
        zp.freeze(live(), "mse")


@pytest.mark.parametrize("part", ["weight", "weight_scale"])
def test_what_training_broke_is_named(part):
    model = live()
    with torch.no_grad():
        model.up._parameters[part].view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"up\.weight: 1 NaN"):
        zp.freeze(model)


def test_quantizing_files_ignores_what_is_learned_while_training(tmp_path):
    llama().save_pretrained(tmp_path / "float")
    recipes = [
        zp.Recipe.from_dict({"rules": [{"match": "*", "weights": "int4"} | extra]})
        for extra in ({}, {"learned_scale": True})
    ]
    ids = torch.arange(12).view(1, 12)
    logits = []
    for i, recipe in enumerate(recipes):
        zp.compress(tmp_path / "float", tmp_path / f"c{i}", recipe=recipe)
        for source in (tmp_path / f"c{i}", tmp_path / "float"):
            options = {} if source.name != "float" else {"recipe": recipe}
            model, _ = zp.load(source, **options)
            logits.append(model(input_ids=ids).logits)
    assert all(torch.equal(logits[0], other) for other in logits[1:])
