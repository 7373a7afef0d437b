"""Emptying a model that somebody still holds."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from zeropoint.errors import StateError


class Released(nn.Module):
    """What is left of a module after `zp.release`: any use of it raises StateError."""

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name) if name.startswith("__") else _refuse(self)

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse(self)

    def __getitem__(self, index: Any) -> NoReturn:
        _refuse(self)

    def __len__(self) -> NoReturn:
        _refuse(self)

    def __iter__(self) -> NoReturn:
        _refuse(self)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"Released({self.__dict__['kind']})"


def _refuse(module: Released) -> NoReturn:
    kind = module.__dict__["kind"]
    raise StateError(f"this {kind} was given back by zp.release; load the model again")


def empty(model: nn.Module) -> None:
    """Drop all that the model's modules hold: parameters, buffers, gradients, hooks, caches, and
    whatever else was put on them. In place: every module becomes a `Released`.

    A tensor that is also held elsewhere (a tied weight in another model, a variable of the caller)
    stays as it is, and so does its memory.
    Raises StateError (released already, not a module, or one whose weights Python does not own),
    before anything is dropped.
    """
    if isinstance(model, Released):
        _refuse(model)
    if not isinstance(model, nn.Module):
        raise StateError(
            f"zp.release takes a model, a torch.nn.Module, not a {type(model).__name__}"
        )
    modules = _modules(model)
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise StateError(
                f"the weights of a {type(module).__name__} belong to TorchScript, not to Python; "
                "delete every reference to it instead"
            )
    for module in modules:
        kind = type(module).__name__
        # Everything at once, accelerate's hooks with it: detached one by one, as accelerate does
        # it, they would first read offloaded weights back into memory.
        module.__dict__.clear()
        object.__setattr__(module, "__class__", Released)
        module.__dict__["kind"] = kind


def _modules(model: nn.Module) -> list[nn.Module]:
    """The model and all modules below it, each once, but for those that are released already."""
    found: dict[int, nn.Module] = {}
    left = [model]
    while left:
        module = left.pop()
        if id(module) in found or isinstance(module, Released):
            continue
        found[id(module)] = module
        if not isinstance(module, torch.jit.ScriptModule):
            left += [child for child in module._modules.values() if child is not None]
    return list(found.values())
