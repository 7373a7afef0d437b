"""What a forward computes is read from its trace: norms and gates of published models, and what
only looks like one.
"""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP, Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from zeropoint.model.formula import expression, gate_of, norm_of
from zeropoint.nn.fused import GateFormula, NormFormula

K = 8


def norm(eps, shift, rounds_first):
    return NormFormula(eps=eps, shift=shift, rounds_first=rounds_first)


@pytest.mark.parametrize(
    ("module", "formula"),
    [
        (LlamaRMSNorm(K, eps=1e-5), norm(1e-5, 0, True)),
        (Qwen3RMSNorm(K, eps=1e-6), norm(1e-6, 0, True)),
        (Olmo2RMSNorm(K, eps=1e-6), norm(1e-6, 0, False)),
        (Gemma2RMSNorm(K, eps=1e-6), norm(1e-6, 1, False)),
        (nn.RMSNorm(K, eps=1e-6), norm(1e-6, 0, False)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_norms_of_published_models_are_read(module, formula):
    assert norm_of(module) == formula
    assert gate_of(module) is None


class Norm(nn.Module):
    """An RMS norm with one thing changed."""

    def __init__(self, change):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(K))
        self.change = change

    def forward(self, x):
        wide = x.float()
        match self.change:
            case "nothing":
                return (wide * torch.rsqrt(wide.square().mean(-1, True) + 1e-6) * self.weight).to(
                    x.dtype
                )
            case "spelled with methods":
                mean = wide.pow(2).mean(-1, keepdim=True)
                return (self.weight.float() * wide.mul(mean.add(1e-6).rsqrt())).type_as(x)
            case "the mean of another axis":
                mean = wide.pow(2).mean(0, keepdim=True)
            case "a cube":
                mean = wide.pow(3).mean(-1, keepdim=True)
            case "the mean taken off":
                wide = wide - wide.mean(-1, keepdim=True)
                mean = wide.pow(2).mean(-1, keepdim=True)
            case "no widening":
                return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            case "a float64 mean":
                mean = wide.pow(2).mean(-1, keepdim=True, dtype=torch.float64)
            case "a condition on values":
                mean = wide.pow(2).mean(-1, keepdim=True)
                if mean.max() > 1:
                    mean = mean * 2
            case "the result kept wide":
                return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, True) + 1e-6))
            case "the weight twice":
                factor = torch.rsqrt(wide.pow(2).mean(-1, True) + 1e-6)
                return self.weight * (self.weight * (wide * factor).to(x.dtype))
            case "two plus weight":
                factor = torch.rsqrt(wide.pow(2).mean(-1, True) + 1e-6)
                return (wide * factor * (2.0 + self.weight.float())).to(x.dtype)
            case "something in place":
                wide.mul_(2)
                mean = wide.pow(2).mean(-1, keepdim=True)
            case "a note":
                self.seen = x
                mean = wide.pow(2).mean(-1, keepdim=True)
            case "an error":
                raise KeyError(self.change)
            case "a wrong assertion":
                assert not isinstance(x, torch.fx.Proxy)
        return self.weight * (wide * torch.rsqrt(mean + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("change", ["spelled with methods"])
def test_other_spellings_are_the_same(change):
    assert norm_of(Norm(change)) == norm(1e-6, 0, False)


@pytest.mark.parametrize(
    "change",
    [
        "the mean of another axis",
        "a cube",
        "the mean taken off",
        "no widening",
        "a float64 mean",
        "a condition on values",
        "the result kept wide",
        "the weight twice",
        "two plus weight",
        "something in place",
        "a note",
        "an error",
        "a wrong assertion",
    ],
)
def test_what_computes_something_else_is_no_rms_norm(change):
    module = Norm(change)
    attributes = dict(vars(module))
    assert norm_of(module) is None
    assert vars(module) == attributes, "a trace leaves nothing behind"


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(K),
        nn.BatchNorm1d(K),
        nn.Linear(K, K),
        nn.SiLU(),
        nn.RMSNorm((2, K), eps=1e-6),
        nn.RMSNorm(K),  # its eps depends on the input's dtype
        nn.RMSNorm(K, eps=1e-6, elementwise_affine=False),
    ],
)
def test_other_modules_are_neither(module):
    assert norm_of(module) is None and gate_of(module) is None


def sizes(kind, **more):
    return kind(hidden_size=64, intermediate_size=128, **more)


def test_gates_of_published_models_are_read():
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "gated_by": "act_fn"}
    llama = LlamaMLP(sizes(transformers.LlamaConfig))
    assert gate_of(llama) == GateFormula(**names, activation="silu")
    gemma = Gemma2MLP(sizes(transformers.Gemma2Config))
    assert gate_of(gemma) == GateFormula(**names, activation="gelu_tanh")
    relu = LlamaMLP(sizes(transformers.LlamaConfig, hidden_act="relu"))
    exact = LlamaMLP(sizes(transformers.LlamaConfig, hidden_act="gelu"))
    phi = Phi3MLP(sizes(transformers.Phi3Config))
    for other in (relu, exact, phi):  # another activation; gate and up in one weight
        assert gate_of(other) is None and norm_of(other) is None


class Gate(nn.Module):
    """A gated perceptron with one thing changed."""

    def __init__(self, change):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(K, K) for _ in range(3))
        self.act = nn.SiLU()
        self.change = change

    def forward(self, x):
        match self.change:
            case "nothing":
                return self.c(self.b(x) * self.act(self.a(x)))
            case "both activated":
                return self.c(self.act(self.b(x)) * self.act(self.a(x)))
            case "one input changed":
                return self.c(self.b(x + x) * self.act(self.a(x)))
            case "a residual":
                return x + self.c(self.b(x) * self.act(self.a(x)))
            case "a sum":
                return self.c(self.b(x) + self.act(self.a(x)))
        return self.c(self.act(self.a(x)))


def test_a_gate_may_be_either_factor_and_nothing_else_may_differ():
    names = {"gate": "a", "up": "b", "down": "c", "gated_by": "act"}
    assert gate_of(Gate("nothing")) == GateFormula(**names, activation="silu")
    for change in ("both activated", "one input changed", "a residual", "a sum", "no gate"):
        assert gate_of(Gate(change)) is None


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


class Trap(nn.Module):
    def forward(self, x, *others):
        raise AssertionError("it takes more than one input and must not be traced")


@pytest.mark.parametrize("module", [Two(), Trap()])
def test_only_one_input_is_followed(module):
    assert expression(module) == ("unknown",)
