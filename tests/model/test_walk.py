"""What a model is made of, found from its structure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeropoint as zp
from tests.models import ARCHITECTURES, build, perceptron
from zeropoint.errors import StateError
from zeropoint.model.replace import replace_module
from zeropoint.model.walk import (
    is_quantized,
    named_modules,
    owned_tensors,
    quantized_modules,
    weight_elements,
    weight_sites,
)


def roles(model) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for site in weight_sites(model):
        found.setdefault(site.role or "none", set()).add(site.name.rpartition(".")[2])
    return found


@pytest.mark.parametrize(
    ("name", "embeddings", "heads", "others"),
    [
        ("llama", {"embed_tokens"}, {"lm_head"}, set()),
        ("llama-tied", {"embed_tokens"}, {"lm_head"}, set()),
        ("gpt2", {"wte", "wpe"}, {"lm_head"}, set()),
        ("gpt-neox", {"embed_in"}, {"lm_head"}, set()),
        ("opt", {"embed_tokens"}, {"lm_head"}, {"embed_positions"}),
        (
            "bert-masked",
            {"word_embeddings", "position_embeddings", "token_type_embeddings"},
            {"decoder"},
            set(),
        ),
        ("t5", {"shared", "embed_tokens", "relative_attention_bias"}, {"lm_head"}, set()),
        ("vit", set(), set(), {"embeddings", "projection"}),
        (
            "whisper",
            {"embed_tokens", "embed_positions"},
            {"proj_out"},
            {"conv1", "conv2", "embed_positions"},
        ),
    ],
)
def test_embeddings_and_heads_are_found_in_every_family(name, embeddings, heads, others):
    found = roles(build(name))
    assert found.get("embedding", set()) == embeddings
    assert found.get("head", set()) == heads
    assert found.get("none", set()) == others
    assert "linear" in found


def test_a_linear_tied_to_an_embedding_is_a_head_in_any_model():
    found = {s.name: s for s in weight_sites(perceptron())}
    assert {n: s.role for n, s in found.items()} == {
        "embed": "embedding",
        "up": "linear",
        "down": "linear",
        "head": "head",
    }
    assert found["head"].tied == found["embed"].tied != found["up"].tied
    assert found["up"].elements == 128 * 64 and found["up"].bytes == 128 * 64 * 4


def test_a_module_has_all_its_names_in_tree_order():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential()})
    model["b"].append(model["a"])
    assert named_modules(model) == {model: ("",), model["a"]: ("a", "b.0"), model["b"]: ("b",)}
    assert [s.names for s in weight_sites(model)] == [("a", "b.0")]


def test_a_tensor_is_counted_once_whatever_it_is_called():
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(4))
    model.same = model.weight
    model.alias = nn.Parameter(model.weight.data)
    model.register_buffer("view", model.weight.data)
    model.register_buffer("other", torch.ones(4))
    assert [n for n, _ in owned_tensors(model)] == ["weight", "other"]


def test_tensors_without_memory_are_told_apart():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    assert [n for n, _ in owned_tensors(model)] == ["0.weight", "0.bias", "1.weight"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_number_of_parameters_does_not_depend_on_the_state(name):
    model = build(name)
    expected = sum(p.numel() for p in model.parameters())
    assert weight_elements(model) == expected and not is_quantized(model)
    zp.quantize(model, "int4", strict=False)
    assert weight_elements(model) == expected and is_quantized(model)
    zp.freeze(model)
    assert weight_elements(model) == expected and is_quantized(model)


def test_quantized_modules_are_listed_in_tree_order():
    model = perceptron()
    assert quantized_modules(model) == {}
    zp.quantize(model, exclude="up")
    assert list(quantized_modules(model)) == ["embed", "down", "head"]


def test_a_module_is_replaced_wherever_it_is():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential()})
    model["b"].append(model["a"])
    new = nn.Identity()
    replace_module(model, ("a", "b.0"), new)
    assert model["a"] is new and model["b"][0] is new


def test_the_root_cannot_be_replaced():
    model = nn.Linear(2, 2)
    with pytest.raises(StateError, match="itself a Linear and cannot be replaced in place"):
        replace_module(model, ("",), nn.Identity())
