"""Edges over which a scale can move: those that exist are found, those that do not are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import build, example_inputs
from zeropoint.model import graph
from zeropoint.model.capture import chains, enter, is_linear, sharing


def edges(model, allowed=lambda m: True):
    """(block, groups, run, folds) of the first block of the model's first chain."""
    wanted = {m for m in model.modules() if is_linear(m)}
    names = next(iter(chains(model, wanted).values()))
    blocks = [model.get_submodule(n) for n in names]
    stream = enter(model, blocks, [example_inputs(model)])

    def run():
        out = stream.run(0, 0, blocks[0])
        return stream.hidden[0], out if isinstance(out, torch.Tensor) else out[0]

    groups = sharing(blocks[0], lambda: run())
    return blocks[0], groups, run, graph.find_folds(blocks[0], groups, run, allowed)


def described(folds):
    return {(f.producer, f.kind, c) for f in folds for c in f.consumers}


ATTENTION = [("input_layernorm", "weight", f"self_attn.{x}_proj") for x in "qkv"]
MLP = [("post_attention_layernorm", "weight", f"mlp.{x}_proj") for x in ("gate", "up")]
EDGES = {
    "llama": {
        *ATTENTION,
        ("self_attn.v_proj", "rows", "self_attn.o_proj"),
        *MLP,
        ("mlp.up_proj", "rows", "mlp.down_proj"),
    },
    # a GELU between fc1 and fc2, q, k and v in one matrix
    "gpt2": {("ln_1", "weight", "attn.c_attn"), ("ln_2", "weight", "mlp.c_fc")},
    "gpt-neox": {
        ("input_layernorm", "weight", "attention.query_key_value"),
        ("post_attention_layernorm", "weight", "mlp.dense_h_to_4h"),
    },
    # a ReLU lets positive factors through
    "opt": {
        *[("self_attn_layer_norm", "weight", f"self_attn.{x}_proj") for x in "qkv"],
        ("self_attn.v_proj", "rows", "self_attn.out_proj"),
        ("final_layer_norm", "weight", "fc1"),
        ("fc1", "rows", "fc2"),
    },
    # norms after the residual sum feed the next sum as well
    "bert": {("attention.self.value", "rows", "attention.output.dense")},
}


@pytest.mark.parametrize("name", EDGES)
def test_the_edges_of_an_architecture_are_found(name):
    _, _, _, folds = edges(build(name))
    assert described(folds) == EDGES[name]


def test_cross_attention_has_an_edge_of_its_own():
    model = build("t5")
    found = []
    for names in chains(model, {m for m in model.modules() if is_linear(m)}).values():
        blocks = [model.get_submodule(n) for n in names]
        stream = enter(model, blocks, [example_inputs(model)])

        def run(stream=stream, block=blocks[0]):
            return stream.hidden[0], stream.run(0, 0, block)[0]

        groups = sharing(blocks[0], run)
        found += graph.find_folds(blocks[0], groups, run, lambda m: True)
    assert (
        "layer.1.EncDecAttention.v",
        "rows",
        "layer.1.EncDecAttention.o",
    ) in described(found)


class OnePlus(nn.Module):
    """A norm that multiplies by 1 + w, as Gemma's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 1.0, size))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def test_a_norm_that_multiplies_by_one_plus_its_weight_is_recognised():
    model = build("llama")
    for layer in model.model.layers:
        layer.input_layernorm = OnePlus(64)
    _, _, _, folds = edges(model)
    assert ("input_layernorm", "one plus weight", "self_attn.v_proj") in described(folds)


@pytest.mark.parametrize("name", EDGES)
@torch.no_grad()
def test_factors_moved_over_an_edge_leave_the_output(name):
    model = build(name)
    block, _, run, folds = edges(model)
    before, expected = run()
    for fold in folds:
        rows = fold.kind == "rows"
        producer = block.get_submodule(fold.producer)
        size = graph.matrix(producer).shape[0] if rows else len(producer.weight)
        graph.apply(block, fold, torch.linspace(0.3, 3.0, size))
    _, found = run()
    assert (found - expected).norm() < 1e-4 * (expected - before).norm()


def test_looking_for_edges_leaves_every_bit():
    model = build("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    edges(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_may_not_change_has_no_edge():
    _, _, _, folds = edges(build("llama"), allowed=lambda m: not isinstance(m, nn.Linear))
    assert folds == []
    _, _, _, folds = edges(build("llama"), allowed=lambda m: isinstance(m, nn.Linear))
    assert {f.kind for f in folds} == {"rows"}
    _, _, _, folds = edges(build("llama"), allowed=lambda m: getattr(m, "out_features", 0) != 32)
    assert {f.producer for f in folds} == {"post_attention_layernorm", "mlp.up_proj"}


def test_a_norm_that_something_else_reads_is_no_producer():
    model = build("llama")
    block = model.model.layers[0]
    norm, attention = block.input_layernorm, block.self_attn.forward
    last = []
    norm.register_forward_hook(lambda m, a, out: last.append(out))
    block.self_attn.forward = lambda *a, **k: (attention(*a, **k)[0] + last[-1], None)
    _, _, _, folds = edges(model)
    assert "input_layernorm" not in {f.producer for f in folds}


def test_columns_of_one_channel_share_a_factor():
    channel = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])  # two heads of values, each read twice
    fold = graph.Fold(producer="v", consumers=("o",), kind="rows", channel=channel)
    found = graph.shared_factors(fold, torch.arange(8.0), 4)
    assert found.tolist() == [1.0, 2.0, 5.0, 6.0]
