"""Passes that leave out what is finished see what passes of the whole block see."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.models import ARCHITECTURES, build, example_inputs
from zeropoint.model import passage as module
from zeropoint.model.capture import Stream, chains, enter, is_linear, sharing
from zeropoint.model.graph import matrix
from zeropoint.model.passage import Passage, find_parts
from zeropoint.model.shelf import Shelf

PARTS = {
    "llama": [("self_attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")],
    "mistral": [("self_attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")],
    "gpt2": [("attn", "attn.c_proj"), ("mlp", "mlp.c_proj")],
    "gpt-neox": [("attention", "attention.dense"), ("mlp", "mlp.dense_4h_to_h")],
    "opt": [("self_attn", "self_attn.out_proj")],
    "bert": [],
}


def entered(model, hidden=None):
    """For each chain: its blocks, and two batches in front of them."""
    batch = example_inputs(model)
    batches = [batch, {k: v.flip(0) for k, v in batch.items()}]
    for names in chains(model, {m for m in model.modules() if is_linear(m)}).values():
        blocks = [model.get_submodule(n) for n in names]
        yield blocks, enter(model, blocks, batches, hidden)


@torch.no_grad()
def pass_all(passage, *, leave_out=True):
    """Every layer's inputs, its weight changed after that, and the hidden states in the end."""
    block = passage.block
    groups = sharing(block, passage.run_example)
    if leave_out:
        passage.parts = find_parts(block, groups, passage.run_example)
    names = {m: n for n, m in block.named_modules()}
    seen = []
    for group in groups:
        seen += [passage.input_of(names[group[0]], i) for i in range(len(passage))]
        for linear in group:
            matrix(linear).mul_(1.25)
    passage.advance()
    return [x for x in seen if x is not None] + list(passage.stream.hidden)


def in_parts(block, stream):
    passage = Passage(block, 0, stream)
    passage.parts = find_parts(block, sharing(block, passage.run_example), passage.run_example)
    return passage


def both(block, stream):
    """`pass_all` of a block and of a copy, with and without leaving anything out."""
    again = Stream(list(stream.hidden), stream.calls, stream.keep)
    plain = Passage(copy.deepcopy(block), 0, again)
    passage = Passage(block, 0, stream)
    return passage, pass_all(passage), pass_all(plain, leave_out=False)


def assert_same(found, expected):
    assert len(found) == len(expected) > 2
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inputs_are_those_of_passes_that_run_everything(name):
    for blocks, stream in entered(build(name).eval()):
        passage, found, expected = both(blocks[0], stream)
        assert_same(found, expected)
        if name in PARTS:
            assert [(p.module, p.linear) for p in passage.parts] == PARTS[name]


@pytest.mark.parametrize("room", [0, 2 * 9 * 64 * 4, 3 * 2 * 9 * 64 * 4])
def test_what_there_is_no_room_for_runs_again(room, monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", room)
    ((blocks, stream),) = entered(build("llama").eval())
    _, found, expected = both(blocks[0], stream)
    assert_same(found, expected)


@torch.no_grad()
def test_a_part_runs_once():
    ((blocks, stream),) = entered(build("llama").eval())
    ran = []
    for layer in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        blocks[0].get_submodule(layer).register_forward_hook(
            lambda m, a, o, name=layer: ran.append(name)
        )
    passage = in_parts(blocks[0], stream)
    ran.clear()
    for layer in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        passage.input_of(layer, 0)
    assert ran == ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"]
    passage.run(0)
    assert ran[3:] == ["mlp.down_proj"]


def test_hidden_states_in_files_mean_that_memory_is_short(tmp_path):
    ((blocks, stream),) = entered(build("llama").eval(), Shelf(tmp_path / "hidden", 0))
    ran = []
    blocks[0].self_attn.q_proj.register_forward_hook(lambda *_: ran.append(1))
    passage = in_parts(blocks[0], stream)
    ran.clear()
    passage.input_of("self_attn.o_proj", 0)
    passage.advance()
    assert len(ran) == 3


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Block(nn.Module):
    """Runs its inner network `times`, and adds its output to the input, in place or not."""

    def __init__(self, *, times=1, in_place=False):
        super().__init__()
        self.inner, self.last = Inner(), nn.Linear(8, 8)
        self.times, self.in_place = times, in_place

    def forward(self, x):
        for _ in range(self.times):
            y = self.inner(x)
            x = y.add_(x) if self.in_place else y + x
        return self.last(x) + x


class Chain(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.layers = nn.ModuleList(Block(**how) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def chain(**how):
    model = Chain(**how)
    blocks = list(model.layers)
    return blocks, enter(model, blocks, [torch.randn(2, 5, 8), torch.randn(2, 5, 8)])


def test_a_block_of_ones_own_has_parts():
    blocks, stream = chain()
    passage, found, expected = both(blocks[0], stream)
    assert [(p.module, p.linear) for p in passage.parts] == [("inner", "inner.down")]
    assert_same(found, expected)


@pytest.mark.parametrize("how", [{"in_place": True}, {"times": 2}])
def test_a_block_that_changes_what_it_is_given_or_runs_a_module_twice_runs_whole(how):
    blocks, stream = chain(**how)
    passage, found, expected = both(blocks[0], stream)
    assert passage.parts == []
    assert_same(found, expected)


@torch.no_grad()
def test_a_module_that_runs_more_often_than_in_the_example_runs_the_second_time():
    blocks, stream = chain()
    twin = copy.deepcopy(blocks[0])
    passage = in_parts(blocks[0], stream)
    blocks[0].times = twin.times = 2
    passage.input_of("inner.down", 0)
    for _ in range(2):
        assert torch.equal(passage.run(0), twin(stream.hidden[0]))


@torch.no_grad()
def test_a_forward_that_somebody_has_replaced_is_put_back():
    blocks, stream = chain()
    inner = blocks[0].inner
    inner.forward = own = lambda x, forward=inner.forward: forward(x)  # as accelerate does it
    passage = Passage(blocks[0], 0, stream)
    pass_all(passage)
    assert passage.parts and vars(inner)["forward"] is own
