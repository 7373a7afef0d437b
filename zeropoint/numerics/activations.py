"""Activations on an integer grid while they are used: one scale for each token."""

from __future__ import annotations

import torch
from torch import Tensor

Q_MAX = 127


def round_tokens(x: Tensor) -> Tensor:
    """x = scale * round(x / scale), scale = max |x| / 127 of each token (row of the last axis).

    x: (..., K) float; returns the same shape and dtype, gradient passed straight through
    (arXiv:1308.3432). A token that holds an Inf or a NaN becomes NaN.

    >>> round_tokens(torch.tensor([[1.0, 0.3, -0.001]]))
    tensor([[1.0000, 0.2992, 0.0000]])
    """
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(dim=-1, keepdim=True) / Q_MAX
    codes = torch.where(scale == 0, 0.0, torch.round(wide / scale))
    rounded = (codes * scale + 0.0).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded
