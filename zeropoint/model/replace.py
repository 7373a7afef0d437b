"""Putting one module, or a parameter's values, in another's place, wherever the model has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zeropoint.errors import StateError


def replace_module(model: nn.Module, names: tuple[str, ...], new: nn.Module) -> None:
    """Register `new` under every one of `names`. Changes `model` in place."""
    for name in names:
        if not name:
            raise StateError(
                f"the model is itself a {type(model).__name__} and cannot be replaced in place; "
                "wrap it: torch.nn.Sequential(model)"
            )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def give_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Let a parameter have other values, on whichever device, wherever it is used. In place."""
    new = nn.Parameter(values, requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, new)
