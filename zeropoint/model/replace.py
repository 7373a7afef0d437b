"""Putting one module in another's place, wherever the model has it."""

from __future__ import annotations

from torch import nn

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
