"""From a frozen model to a folder: what is written, once, under which name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import zeropoint as zp
from tests.models import build, perceptron, tokenizer
from zeropoint.errors import StateError
from zeropoint.model.save import recipe_of
from zeropoint.nn import QModule


def saved(model, path, weights="int8", **options):
    """Quantize, freeze and save; returns the folder."""
    zp.quantize(model, weights, **options)
    zp.freeze(model)
    zp.save(model, path)
    return path


def stored_names(path) -> set[str]:
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_a_float_model_is_refused_with_what_to_do(tmp_path):
    message = r"not quantized: call zp\.quantize\(model\) and zp\.freeze.*model\.save_pretrained"
    with pytest.raises(StateError, match=message):
        zp.save(perceptron(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_live_model_is_refused_by_the_first_live_module(tmp_path):
    model = perceptron()
    zp.quantize(model, exclude="embed")
    with pytest.raises(StateError, match=r"^up still has float weights; call zp\.freeze"):
        zp.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_weight_is_stored_under_its_own_name_in_a_shape_no_float_weight_has(tmp_path):
    path = saved(perceptron(), tmp_path / "m", "int4")
    with safe_open(path / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert shapes["up.weight"] == [128 * 64 // 2] and dtypes["up.weight"] == "U8"
    assert shapes["up.weight_scale"] == [128, 2] and dtypes["up.weight_scale"] == "F16"
    assert shapes["up.weight_zero_point"] == [128, 2] and dtypes["up.weight_zero_point"] == "I8"
    assert shapes["embed.weight"] == [11 * 64] and dtypes["embed.weight"] == "U8"
    assert {"up.bias", "norm.running_mean", "norm.num_batches_tracked"} < shapes.keys()
    assert not any(name.startswith("head") for name in shapes), "tied: stored once"
    assert zp.verify(path) == []


def test_the_configuration_says_how_the_model_was_quantized(tmp_path):
    path = saved(build("llama"), tmp_path / "m", "int4", exclude="*.v_proj")
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    quantization = config["quantization_config"]
    assert quantization.keys() == {"quant_method", "format_version", "recipe"}
    assert quantization["quant_method"] == "zeropoint"
    assert quantization["recipe"]["rules"][0] == {"match": "*.v_proj", "weights": "keep"}


def test_the_dtype_that_is_written_is_the_models_own(tmp_path):
    path = saved(build("llama").to(torch.bfloat16), tmp_path / "m")
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    assert zp.load(path)[0].dtype == torch.bfloat16


def test_the_manifest_lists_every_file_and_tensor(tmp_path):
    model = build("llama-tied")
    zp.quantize(model)
    zp.freeze(model)
    zp.save(model, tmp_path / "m", tokenizer=tokenizer())
    manifest = json.loads((tmp_path / "m" / "zeropoint.json").read_text())
    files = {p.name for p in (tmp_path / "m").iterdir()}
    assert files == {*manifest["files"], "zeropoint.json"}
    assert {"tokenizer.json", "generation_config.json", "config.json"} < files
    assert manifest["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    parts = {n + s for n in manifest["weights"] for s in ("", "_scale")}
    assert stored_names(tmp_path / "m") == parts | manifest["tensors"].keys()
    assert manifest["weights"]["model.embed_tokens.weight"] == {
        "scheme": {
            "format": "int8",
            "granularity": "channel",
            "symmetric": True,
            "scale_dtype": "float32",
        },
        "shape": [99, 64],
        "dtype": "float32",
    }


class Names(nn.Module):
    """A tied parameter whose name begins the name of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.a = nn.Parameter(torch.randn(3))
        self.b = self.a
        self.b2 = nn.Parameter(torch.randn(3))


def test_a_name_that_begins_with_a_tied_name_is_stored_too(tmp_path):
    model = Names()
    path = saved(model, tmp_path / "m")
    assert stored_names(path) == {"layer.weight", "layer.weight_scale", "layer.bias", "a", "b2"}
    loaded, _ = zp.load(path, model=Names())
    assert torch.equal(loaded.b2, model.b2) and loaded.b is loaded.a


def test_views_of_one_storage_are_stored_as_separate_tensors(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32))
    whole = torch.arange(8.0)
    model.register_buffer("first", whole[:4])
    model.register_buffer("rest", whole[4:])
    model.register_buffer("whole", whole)
    path = saved(model, tmp_path / "m")
    empty = nn.Sequential(nn.Linear(32, 32))
    for name, size in (("first", 4), ("rest", 4), ("whole", 8)):
        empty.register_buffer(name, torch.zeros(size))
    loaded, _ = zp.load(path, model=empty)
    assert loaded.first.tolist() == [0, 1, 2, 3] and loaded.rest.tolist() == [4, 5, 6, 7]
    assert torch.equal(loaded.whole, whole)


def test_a_transposed_parameter_is_stored_with_its_values(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    model[1].weight = nn.Parameter(torch.randn(32, 4).t())
    path = saved(model, tmp_path / "m", exclude="1")
    loaded, _ = zp.load(path, model=nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)))
    assert torch.equal(loaded[1].weight, model[1].weight)


def test_saving_does_not_change_the_model(tmp_path):
    model = build("llama-tied")
    zp.quantize(model)
    zp.freeze(model)
    before = {n: (id(t), t._version) for n, t in model.state_dict(keep_vars=True).items()}
    config = model.config.to_dict()
    zp.save(model, tmp_path / "m")
    assert {n: (id(t), t._version) for n, t in model.state_dict(keep_vars=True).items()} == before
    assert model.config.to_dict() == config


def test_the_recipe_is_remembered_from_quantize_to_load(tmp_path):
    model = perceptron()
    report = zp.quantize(model, "int4", exclude="up")
    assert recipe_of(model) == report.recipe
    zp.freeze(model)
    zp.save(model, tmp_path / "m")
    loaded, _ = zp.load(tmp_path / "m", model=perceptron())
    assert recipe_of(loaded) == report.recipe
    zp.dequantize(model)
    assert "_zeropoint_recipe" not in vars(model)


def test_a_model_quantized_in_part_has_a_rule_for_each_module(tmp_path):
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(32, 32)), "b": nn.Linear(32, 32)})
    zp.quantize(model["a"], "int4")
    zp.freeze(model)
    recipe = recipe_of(model)
    assert [(r.match, str(r.scheme)) for r in recipe.rules] == [("a.0", "int4 g32 asymmetric")]
    zp.save(model, tmp_path / "m")
    empty = nn.ModuleDict({"a": nn.Sequential(nn.Linear(32, 32)), "b": nn.Linear(32, 32)})
    loaded, _ = zp.load(tmp_path / "m", model=empty)
    assert isinstance(loaded["a"][0], QModule) and type(loaded["b"]) is nn.Linear
    assert zp.verify(tmp_path / "m") == []
