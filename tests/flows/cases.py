"""A small model, what was done to it, and proof that a refused call did nothing."""

from __future__ import annotations

import pytest
from torch import nn

import zeropoint as zp
from zeropoint.nn import QModule
from zeropoint.scheme import Scheme

INT8, INT4 = Scheme.of("int8"), Scheme.of("int4")


class Block(nn.Module):
    """Four linear layers, q and v in one container."""

    def __init__(self, k: int = 64) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.q = nn.Linear(k, 64)
        self.attention.v = nn.Linear(k, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)


def actions(model) -> dict[str, str]:
    """Scheme by name of the quantized modules; a float module that owns a matrix is "float"."""
    return {
        name: str(m.scheme) if isinstance(m, QModule) else "float"
        for name, m in model.named_modules()
        if isinstance(m, QModule) or any(p.dim() > 1 for p in m.parameters(recurse=False))
    }


def snapshot(model):
    """What must be the same after a refused call."""
    modules = {n: type(m) for n, m in model.named_modules(remove_duplicate=False)}
    tensors = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    return modules, tensors, vars(model).keys()


def refused(model, error, match, **arguments):
    """The call raises, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=match):
        zp.quantize(model, **arguments)
    assert snapshot(model) == before
