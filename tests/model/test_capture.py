"""Blocks run one by one see what they see inside the model."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from tests.models import ARCHITECTURES, build, example_inputs, perceptron
from zeropoint.model import capture
from zeropoint.model.capture import chains, enter, input_of, is_linear, sharing, tokens_of
from zeropoint.model.passage import Passage


def wanted(model):
    return {m for m in model.modules() if is_linear(m)}


CHAINS = {
    "llama": ["model.layers"],
    "gpt2": ["transformer.h"],
    "gpt-neox": ["gpt_neox.layers"],
    "opt": ["model.decoder.layers"],
    "bert": ["encoder.layer"],
    "t5": ["encoder.block", "decoder.block"],
    "vit": ["vit.layers"],
    "whisper": ["model.encoder.layers", "model.decoder.layers"],
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_layers_of_a_transformer_are_found_by_their_shape(name):
    model = build(name)
    found = chains(model, wanted(model))
    assert list(found) == CHAINS[name]
    assert all(len(blocks) == 2 for blocks in found.values())


def test_lists_that_are_no_blocks_are_left_out():
    model = nn.Module()
    model.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.mixed = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.ReLU()])
    model.empty = nn.ModuleList()
    model.norms = nn.ModuleList([nn.Sequential(nn.LayerNorm(4))])
    model.good = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(4, 4))]))])
    assert list(chains(model, wanted(model))) == ["good"]
    assert chains(model, set()) == {}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_running_the_blocks_one_by_one_is_running_the_model(name):
    model = build(name)
    batch = example_inputs(model)
    batches = [batch, {k: v.flip(0) for k, v in batch.items()}]
    for blocks in chains(model, wanted(model)).values():
        modules = [model.get_submodule(b) for b in blocks]
        stream = enter(model, modules, batches)
        assert not isinstance(stream, str), stream
        seen = []
        handle = modules[-1].register_forward_hook(
            lambda m, a, out, s=seen: s.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        for one in batches:
            capture.run_model(model, one)
        handle.remove()
        for index, block in enumerate(modules):
            Passage(block, index, stream).advance()
        for found, expected in zip(stream.hidden, seen, strict=True):
            torch.testing.assert_close(found, expected)


def test_layers_that_read_one_tensor_are_one_group():
    model = build("llama")
    blocks = list(model.model.layers)
    stream = enter(model, blocks, [example_inputs(model)])
    names = {m: n.rpartition(".")[2] for n, m in blocks[0].named_modules()}
    groups = sharing(blocks[0], lambda: stream.run(0, 0, blocks[0]))
    assert [sorted(names[m] for m in g) for g in groups] == [
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_a_layer_that_does_not_run_comes_last_and_sees_nothing():
    model = build("llama")
    blocks = list(model.model.layers)
    blocks[0].unused = nn.Linear(64, 64)
    stream = enter(model, blocks, [example_inputs(model)])
    run = lambda: stream.run(0, 0, blocks[0])  # noqa: E731
    assert sharing(blocks[0], run)[-1] == [blocks[0].unused]
    assert input_of(blocks[0].unused, run) is None


def test_the_pass_ends_where_the_layer_begins():
    model = build("llama")
    block = model.model.layers[0]
    stream = enter(model, list(model.model.layers), [example_inputs(model)])
    ran = []
    block.mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    x = input_of(block.self_attn.o_proj, lambda: stream.run(0, 0, block))
    assert x.shape == (2, 9, 64) and not ran


def test_padding_is_left_out():
    x = torch.arange(24.0).view(2, 4, 3)
    keep = torch.tensor([[True, True, False, False], [True, True, True, False]])
    found = tokens_of(x, [keep])
    assert found.shape == (5, 3) and found[2].tolist() == [12, 13, 14]
    assert torch.equal(tokens_of(x.view(8, 3), [keep]), found)
    other = torch.zeros(2, 7, dtype=torch.bool)
    assert torch.equal(tokens_of(x, [other, keep]), found), "the mask of its own shape"
    assert tokens_of(x, []).shape == (8, 3)


def test_masks_come_from_the_batch():
    mask = torch.tensor([[1, 1, 0]])
    batch = {"input_ids": torch.ones(1, 3), "attention_mask": mask}
    assert capture.kept_tokens(batch)[0].tolist() == [[True, True, False]]
    assert capture.kept_tokens({"attention_mask": torch.ones(1, 3)}) == []
    assert capture.kept_tokens(torch.ones(1, 3)) == []


class Twice(nn.Module):
    """Runs its blocks twice, as models with shared layers do."""

    def __init__(self, times: int = 2, skip: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.times, self.skip = times, skip

    def forward(self, x):
        for _ in range(self.times):
            for layer in self.layers:
                x = layer(x) + self.skip * x
        return x


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Twice(), r"its blocks run \[2\] times in one pass, not once each"),
        (Twice(0), r"its blocks run \[0\] times in one pass, not once each"),
        (Twice(1, 0.5), "a block does not take the output of the block before it"),
    ],
)
def test_a_list_that_is_no_chain_says_why(model, reason):
    found = enter(model, list(model.layers), [torch.randn(3, 8)])
    assert isinstance(found, str) and re.fullmatch(reason, found)


def test_a_block_that_remembers_is_no_chain():
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    model = Twice(1)
    model.layers = nn.ModuleList(Counting(nn.Linear(8, 8)) for _ in range(2))
    found = enter(model, list(model.layers), [torch.randn(3, 8)])
    assert found == "a block run alone answers differently than inside the model"


def test_observing_the_whole_model_shows_every_input():
    model = perceptron()
    seen = {}
    capture.observe(
        model,
        [model.up, model.down],
        [torch.tensor([0, 1]), torch.tensor([2])],
        lambda m, x: seen.setdefault(m, []).append(x),
    )
    assert [len(x) for x in seen[model.up]] == [2, 1]
    assert torch.equal(torch.cat(seen[model.up]), model.embed.weight[:3])


def test_capture_leaves_no_hooks():
    model = build("llama")
    before = copy.deepcopy({n: len(m._forward_pre_hooks) for n, m in model.named_modules()})
    stream = enter(model, list(model.model.layers), [example_inputs(model)])
    sharing(model.model.layers[0], lambda: stream.run(0, 0, model.model.layers[0]))
    assert {n: len(m._forward_pre_hooks) for n, m in model.named_modules()} == before
