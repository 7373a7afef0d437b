"""Dequantize in the activation's dtype, then torch's own operator. Runs wherever torch runs; saves
memory, not time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeropoint.kernels.spec import Spec
from zeropoint.numerics.activations import round_tokens
from zeropoint.qtensor import QTensor


def why_not(spec: Spec) -> str | None:
    """Usable for every scheme on every device."""
    return None


def linear(x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """y = x @ weight.T + bias. x: (..., K) float; weight: (N, K); bias: (N,); returns (..., N) of
    x's dtype.
    """
    if weight.scheme.activations == "int8":
        x = round_tokens(x)
    return torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias)


def embedding(indices: Tensor, weight: QTensor, dtype: torch.dtype) -> Tensor:
    """Rows of the weight, the others never unpacked. indices: (...) int; returns (..., K) of
    `dtype`.
    """
    rows = weight.rows(indices.reshape(-1)).dequantize(dtype)
    return rows.view(*indices.shape, weight.shape[1])
