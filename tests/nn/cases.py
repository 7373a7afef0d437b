"""A float module and an input for every row of MODULES. N = 6, K = 128."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zeropoint.nn import QConv1D, QEmbedding, QLinear, quantized_type

N, K = 6, 128

FLOATS = {
    QLinear: lambda: nn.Linear(K, N),
    QEmbedding: lambda: nn.Embedding(N, K, padding_idx=2),
    QConv1D: lambda: Conv1D(N, K),
}


def float_module(kind, dtype=torch.float32, seed=0):
    """A float module of this kind whose parameters are random, bias included."""
    module = FLOATS[kind]().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def live_module(kind, scheme, dtype=torch.float32, seed=0):
    """The same, live."""
    module = float_module(kind, dtype, seed)
    assert quantized_type(module) is kind
    return kind.from_float(module, scheme)


def example_input(kind, dtype=torch.float32):
    """What the module takes: indices or activations."""
    if kind is QEmbedding:
        return torch.tensor([[0, 5, 2], [1, 1, 3]])
    return torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1)).to(dtype)
