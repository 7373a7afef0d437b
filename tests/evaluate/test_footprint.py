"""The bytes a model holds: every tensor once, by dtype, in a tree."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import zeropoint as zp
from tests.models import build, llama, perceptron

WIDTH, WORDS = 64, 11
PERCEPTRON = {  # elements
    "embed": WORDS * WIDTH,
    "up": 2 * WIDTH * WIDTH + 2 * WIDTH,
    "norm": 2 * 2 * WIDTH,
    "down": 2 * WIDTH * WIDTH + WIDTH,
}
BUFFERS = 2 * 2 * WIDTH * 4 + 8  # running mean and variance, and one int64


def node(found, name):
    """The node of the module called `name`."""
    here = found.root
    for leaf in name.split("."):
        here = here.children[leaf]
    return here


def test_parameters_and_buffers_are_counted_tied_ones_once():
    found = zp.footprint(perceptron())
    assert found.parameters == sum(PERCEPTRON.values())
    assert found.parameter_bytes == 4 * found.parameters and found.buffer_bytes == BUFFERS
    assert found.total_bytes == found.parameter_bytes + found.buffer_bytes
    assert found.by_dtype == {"float32": found.total_bytes - 8, "int64": 8}
    assert found.bits_per_weight == 8 * found.total_bytes / found.parameters
    assert found.root.children.keys() == PERCEPTRON.keys(), "the head is the embedding"


def test_bytes_of_a_module_are_those_of_all_below_it():
    model = build("llama")
    found = zp.footprint(model)

    def check(here, module):
        tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
        assert here.bytes == sum(t.nbytes for t in tensors.values()) == sum(here.by_dtype.values())
        assert here.kind == type(module).__name__
        for leaf, child in here.children.items():
            assert child.name.rpartition(".")[2] == leaf
            check(child, model.get_submodule(child.name))

    check(found.root, model)
    assert node(found, "model.layers.1.mlp").bytes == 3 * 64 * 128 * 4


def test_dtypes_are_told_apart():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 2).to(torch.bfloat16))
    found = zp.footprint(model)
    assert found.by_dtype == {"float32": 40, "bfloat16": 20}
    assert found.root.children["1"].by_dtype == {"bfloat16": 20}


def test_two_names_of_one_module_are_one():
    model = nn.ModuleDict({"a": nn.Linear(4, 2)})
    model["b"] = model["a"]
    assert zp.footprint(model).total_bytes == 40


def test_two_parameters_on_one_memory_are_one():
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert zp.footprint(model).total_bytes == 32


def test_a_model_without_memory_has_the_bytes_it_would_have():
    with torch.device("meta"):
        empty = llama(tied=True)
    empty.tie_weights()
    assert zp.footprint(empty).total_bytes == zp.footprint(llama(tied=True)).total_bytes


def test_a_module_without_tensors_is_empty():
    found = zp.footprint(nn.Sequential(nn.ReLU()))
    assert (found.total_bytes, found.parameters, found.bits_per_weight) == (0, 0, 0)
    assert "0.0 MB" in str(found)


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8 + 32 / 64), ("int4", 4 + 24 / 32)])
def test_a_frozen_model_holds_codes_scales_and_zero_points(weights, bits):
    model = perceptron()
    before = zp.footprint(model)
    zp.quantize(model, weights)
    live = zp.footprint(model)
    assert live.total_bytes == before.total_bytes and live.by_dtype == before.by_dtype
    zp.freeze(model)
    found = zp.footprint(model)
    assert found.parameters == before.parameters
    layer = found.root.children["up"]
    assert layer.bytes == 2 * WIDTH * WIDTH * bits / 8 + 2 * WIDTH * 4
    assert layer.scheme == str(model.up.scheme) and layer.kind == "QLinear"
    assert found.root.children["embed"].bytes == WORDS * (WIDTH + 4)
    assert "head" not in found.root.children
    assert found.parameter_bytes == 4 * (2 * WIDTH + WIDTH + 2 * 2 * WIDTH), "biases and norm"
    assert found.total_bytes == found.parameter_bytes + found.buffer_bytes < before.total_bytes / 3


def test_the_dictionary_has_the_documented_keys_and_is_json():
    model = perceptron()
    zp.quantize(model)
    zp.freeze(model)
    found = zp.footprint(model)
    data = json.loads(json.dumps(found.to_dict()))
    assert list(data) == [
        "total_bytes",
        "parameter_bytes",
        "buffer_bytes",
        "parameters",
        "bits_per_weight",
        "by_dtype",
        "modules",
    ]
    assert data["total_bytes"] == found.total_bytes == data["modules"]["bytes"]
    assert data["modules"]["kind"] == "Perceptron" and data["modules"]["name"] == ""
    rows = {row["name"]: row for row in data["modules"]["children"]}
    assert rows.keys() == PERCEPTRON.keys()
    assert rows["embed"] == {
        "name": "embed",
        "kind": "QEmbedding",
        "scheme": "int8 per channel",
        "bytes": WORDS * (WIDTH + 4),
        "by_dtype": {"uint8": WORDS * WIDTH, "float32": WORDS * 4},
        "children": [],
    }


def test_the_text_is_a_tree_with_sizes_shares_and_dtypes():
    lines = str(zp.footprint(perceptron())).splitlines()
    assert lines[0] == (
        "0.1 MB for 0.0 M parameters, 32.47 bits per weight (MB by dtype: float32 0.1, int64 0.0)"
    )
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "Perceptron 0.07 MB 100.0% float32/int64",
        "embed 0.00 MB 4.0% float32",
        "up 0.03 MB 46.8% float32",
        "norm 0.00 MB 2.9% float32/int64",
        "down 0.03 MB 46.4% float32",
    ]
    assert all(line.startswith("  ") for line in lines[2:])


def test_equal_blocks_share_their_lines_in_the_text():
    model = llama(layers=4)
    zp.quantize(model, "int4", exclude="*.3.mlp.*")
    zp.freeze(model)
    lines = [" ".join(line.split()) for line in str(zp.footprint(model)).splitlines()]
    (row,) = [line for line in lines if line.startswith("0 ... 2, each")]
    one = node(zp.footprint(model), "model.layers.0").bytes
    assert f"{one / 1e6:,.2f} MB" in row
    assert sum(line.startswith("q_proj") for line in lines) == 2, "of blocks 0 to 2, and of 3"
    assert any(line.startswith("q_proj") and line.endswith("int4 g32 asymmetric") for line in lines)
