"""Quantized modules. To add one: a file with a QModule, and one line in MODULES."""

from __future__ import annotations

from torch import nn

from zeropoint.nn.embedding import QEmbedding
from zeropoint.nn.linear import QConv1D, QLinear
from zeropoint.nn.qmodule import PART_NAMES, QModule

__all__ = ["MODULES", "PART_NAMES", "QConv1D", "QEmbedding", "QLinear", "QModule", "quantized_type"]

MODULES: dict[str, type[QModule]] = {q.float_type: q for q in (QLinear, QEmbedding, QConv1D)}


def quantized_type(module: nn.Module) -> type[QModule] | None:
    """The quantized module for a float module of exactly this type (a subclass may read its weight
    in its own way).
    """
    kind = type(module)
    return MODULES.get(f"{kind.__module__}.{kind.__qualname__}")
