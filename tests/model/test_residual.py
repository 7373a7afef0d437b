"""The residual stream is told apart from the rest, or the reason why it cannot be is given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import build, example_inputs
from zeropoint.model.residual import Residual, commutes, find_residual, gain_of
from zeropoint.numerics.hadamard import rotation

WIDTH = 16


class Block(nn.Module):
    """A norm and a perceptron; one layer of more in the width of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH)

    def forward(self, x):
        return self.down(self.up(self.norm(x)).relu())


class Tiny(nn.Module):
    """Nothing but a residual stream. Subclasses do something on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.block = Block()
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)

    def on_the_way(self, x):
        return x

    def forward(self, ids):
        x = self.embed(ids)
        x = self.on_the_way(x + self.block(x))
        return self.head(self.norm(x))


def found(model, batch=None):
    """The stream or the refusal; what is changed meanwhile is put back."""
    before = [(p, p.clone(), p.requires_grad) for p in model.parameters()]
    ids = torch.arange(8).reshape(2, 4)
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))

    def run():
        answer = model(ids) if batch is None else model(**batch)
        return answer if isinstance(answer, torch.Tensor) else answer[0]

    result = find_residual(model, embedding, run)
    assert all(torch.equal(p, value) and p.requires_grad is r for p, value, r in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return result


def named(model, result):
    names = {m: n for n, m in model.named_modules()} | {None: None}
    assert isinstance(result, Residual), result
    norms = {names[norm]: [names[m] for m in readers] for norm, readers in result.norms.items()}
    return [names[m] for m in result.writers], norms


def test_writers_norms_and_readers_are_found():
    model = Tiny()
    model.embed.weight.requires_grad_(False)
    assert named(model, found(model)) == (
        ["embed", "block.down"],
        {None: [], "block.norm": ["block.up"], "norm": ["head"]},
    )


@pytest.mark.parametrize(
    ("name", "writers", "norms"),
    [
        ("llama", ["embed_tokens", "o_proj", "down_proj"], 5),
        ("gpt2", ["wte", "wpe", "c_proj", "c_proj"], 5),
        ("gpt-neox", ["embed_in", "dense", "dense_4h_to_h"], 5),  # parallel
        ("opt", ["embed_tokens", "embed_positions", "out_proj", "fc2"], 5),
        ("t5", ["embed_tokens", "o", "wo", "o", "o", "wo"], 12),
    ],
)
def test_streams_of_architectures_are_found(name, writers, norms):
    model = build(name)
    written, read = named(model, found(model, example_inputs(model)))
    assert {w.split(".")[-1] for w in written} == set(writers)
    assert len(read) - 1 == norms and read[None] == []
    if name == "t5":  # what the encoder gives is read by every layer of the decoder
        across = [r for r in read["encoder.final_layer_norm"] if "EncDecAttention" in r]
        assert len(across) == 4


def test_parameters_and_linear_layers_at_the_stream_itself_are_found():
    class Positions(Tiny):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.ones(4, WIDTH))
            self.skip = nn.Linear(WIDTH, 24)

        def on_the_way(self, x):
            x = x * 3.0 + self.positions
            return x + self.block.down(self.skip(x).relu())

    model = Positions()
    result = found(model)
    assert result.parameters == [model.positions]
    assert result.norms[None] == [model.skip]


class Constant(Tiny):
    def on_the_way(self, x):
        return x + torch.ones(WIDTH)


class Gated(Tiny):
    def on_the_way(self, x):
        return x * self.block.down.weight.sum()


class Curved(Tiny):
    def on_the_way(self, x):
        return x + x.tanh()


class NoModule(Tiny):
    def on_the_way(self, x):
        return x + self.block.down(self.block.up(x / x.norm(dim=-1, keepdim=True)))


class Answer(Tiny):
    def forward(self, ids):
        return self.embed(ids) + self.block(self.embed(ids))


class NoHead(Tiny):
    def forward(self, ids):
        return self.norm(self.on_the_way(self.embed(ids) + self.block(self.embed(ids))))


class PostNorm(Tiny):
    def on_the_way(self, x):
        return self.norm(x) + x


class PreSum(Tiny):
    def forward(self, ids):
        x = self.norm(self.embed(ids) + self.block(self.embed(ids)))
        return self.head(x + 1)


class Squared(Tiny):
    def forward(self, ids):
        x = self.norm(self.embed(ids) + self.block(self.embed(ids)))
        return self.head(x.square())


class NoNorm(Tiny):
    def forward(self, ids):
        return self.head(self.embed(ids)) + self.block(self.embed(ids).detach()).sum()


class NoWriter(Tiny):
    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


class Elsewhere(Tiny):
    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.block(x)
        aside = self.block.down(self.block.up(self.block.norm(x)).relu())
        return self.head(self.norm(x)) + aside.tanh().sum()


class TwoWays(Tiny):
    def on_the_way(self, x):
        return x + self.block.down(self.block.up(x).relu())


class SomethingElse(Tiny):
    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.block(x)
        return self.head(self.norm(x)) + self.head(self.embed.weight[:1].tanh())


class Shared(Tiny):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, 24)
        self.other.weight = self.block.up.weight

    def on_the_way(self, x):
        return x + self.block.down(self.other(self.other.weight.tanh()).mean(0).relu())


class Cut(Tiny):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(WIDTH // 2, 24)

    def on_the_way(self, x):
        return x + self.block.down(self.part(x[..., : WIDTH // 2]).relu())


class CutWriter(Tiny):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(24, WIDTH // 2)

    def on_the_way(self, x):
        half = self.part(self.block.up(self.block.norm(x)))
        return x + torch.cat([half, half], -1)


class CutParameter(Tiny):
    def __init__(self):
        super().__init__()
        self.part = nn.Parameter(torch.ones(WIDTH // 2))

    def on_the_way(self, x):
        return x + torch.cat([self.part, self.part])


class Unused(Tiny):
    def __init__(self):
        super().__init__()
        self.expert = nn.Linear(WIDTH, WIDTH)


class NoGraph(Tiny):
    @torch.no_grad()
    def forward(self, ids):
        return super().forward(ids)


REFUSED = {
    Constant: "Add after block.down adds a constant to the residual stream",
    Gated: "Mul after block.down multiplies the residual stream by what was computed",
    Curved: "Tanh after block.down reads the residual stream, and is no norm",
    NoModule: "LinalgVectorNorm after block.down reads the residual stream, and is no norm",
    Answer: "the residual stream is itself the answer",
    NoHead: "what norm gives is the answer; rotate the model with its head",
    PostNorm: "norm, a norm, writes to the residual stream",
    PreSum: "norm, a norm, writes to the residual stream",
    Squared: "Pow after norm reads norm, and is no linear layer",
    NoNorm: "no norm reads what the embeddings write",
    NoWriter: "no linear layer writes to the residual stream before norm",
    Elsewhere: "block.down writes to the residual stream, and elsewhere",
    TwoWays: "block.up reads the residual stream by two ways",
    SomethingElse: "head reads the residual stream, and something else",
    Shared: "other shares its weight with block.up",
    Cut: "part has 8 channels, the residual stream 16",
    CutWriter: "part has 8 channels, the residual stream 16",
    CutParameter: "a parameter is added to the residual stream that has not its 16 channels",
    Unused: "expert.weight has no part in the answer to this example; give one in which it has",
    NoGraph: "its forward pass leaves no graph of what was computed from what",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_told_apart_is_refused(kind):
    assert found(kind()) == REFUSED[kind]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert-masked", "bert.embeddings.LayerNorm, a norm, writes to the residual stream"),
        ("bert", "embeddings.LayerNorm, a norm, writes to the residual stream"),
    ],
)
def test_norms_behind_the_sums_are_refused(name, reason):
    model = build(name)
    assert found(model, example_inputs(model)) == reason


class OnePlus(nn.RMSNorm):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Odd(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x) * self.weight


@pytest.mark.parametrize(
    ("kind", "neutral", "free", "keeping"),
    [
        (nn.RMSNorm, 1, True, True),
        (OnePlus, 0, True, True),
        (nn.LayerNorm, 1, False, True),
        (nn.BatchNorm1d, 1, False, False),
    ],
)
@torch.no_grad()
def test_what_a_norm_does_is_found_by_running_it(kind, neutral, free, keeping):
    norm = kind(WIDTH).eval()
    norm.weight.copy_(torch.linspace(-0.5, 1.5, WIDTH))
    if kind is nn.BatchNorm1d:
        norm.running_var.copy_(torch.linspace(0.5, 1.5, WIDTH))
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    gain = gain_of(norm)
    assert gain is not None and gain.neutral == neutral
    assert torch.equal(gain.gain, norm.weight.double() + 1 - neutral)
    assert commutes(norm, gain, rotation(WIDTH, 0)) is free
    assert commutes(norm, gain, rotation(WIDTH, 0, keeps_mean=True)) is keeping
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


@torch.no_grad()
def test_a_norm_that_does_something_else_has_no_gain():
    norm = Odd(WIDTH)
    norm.weight.copy_(torch.linspace(-0.5, 1.5, WIDTH))
    assert gain_of(norm) is None
