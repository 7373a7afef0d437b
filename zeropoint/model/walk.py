"""What a model is made of: its tensors, each once, and the modules that own weight matrices.

Works on the structure of the module tree, never on architecture names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.nn import QModule, quantized_type
from zeropoint.scheme import Role

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A module that owns at least one float weight matrix (two or more axes).

    names: every name the module object is registered under; the first one speaks for it.
    role: what its weight does, None for a type that has no quantized counterpart. obstacle: why it
    cannot be quantized.
    elements, bytes: of its weight matrices. tied: sites with the same number share one weight.
    """

    names: tuple[str, ...]
    module: nn.Module
    role: Role | None
    obstacle: str | None
    elements: int
    bytes: int
    tied: int

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def named_modules(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module object with all names it is registered under, in tree order."""
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), name)
    return names


def weight_sites(model: nn.Module) -> list[Site]:
    """The modules of a float model that own weight matrices, in tree order."""
    modules = named_modules(model)
    heads = _heads(model, modules)
    sites = []
    for module, names in modules.items():
        matrices = [p for p in module._parameters.values() if p is not None and _is_matrix(p)]
        if not matrices or isinstance(module, QModule):
            continue
        role, obstacle = _role(module, heads)
        sites.append(
            Site(
                names=names,
                module=module,
                role=role,
                obstacle=obstacle,
                elements=sum(p.numel() for p in matrices),
                bytes=sum(p.nbytes for p in matrices),
                tied=id(matrices[0]),
            )
        )
    return sites


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.dim() >= 2


def _role(module: nn.Module, heads: set[nn.Module]) -> tuple[Role | None, str | None]:
    quantized = quantized_type(module)
    kind = type(module).__name__
    if quantized is None:
        base = next((b for b in (nn.Linear, nn.Embedding) if isinstance(module, b)), None)
        if base is None:
            return None, f"no quantized counterpart of {kind}"
        return (
            None,
            f"{kind} is a subclass of {base.__name__} and may read its weight in its own way",
        )
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return None, f"the weight of this {kind} is computed from other parameters"
    if _has_extras(module):
        return None, "it carries hooks or tensors beside weight and bias, which would be lost"
    weight: Any = module.weight
    if weight.dtype not in FLOATS:
        return None, f"its weight is {weight.dtype} already"
    if weight.numel() == 0:
        return None, "its weight is empty"
    obstacle = quantized.why_not(module)
    if obstacle is not None:
        return None, obstacle
    if isinstance(module, nn.Embedding):
        return "embedding", None
    return ("head" if module in heads else "linear"), None


def _has_extras(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    children = (module._buffers, module._modules, module._parameters.keys() - {"weight", "bias"})
    return any(hooks) or any(children)


def _heads(model: nn.Module, modules: dict[nn.Module, tuple[str, ...]]) -> set[nn.Module]:
    """Modules that turn hidden states into logits: what the model calls its output embeddings, or
    tied to an embedding.
    """
    embedded = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
    heads = {m for m in modules if isinstance(m, nn.Linear) and id(m.weight) in embedded}
    get_output: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = get_output()
    return heads | ({output} if output is not None else set())


def owned_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer really held, each storage once, under its first name (parameters
    before buffers).
    """
    seen = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        meta = tensor.device.type == "meta"
        key = id(tensor) if meta else (tensor.data_ptr(), tensor.nbytes, tensor.device)
        if key not in seen or tensor.nbytes == 0:
            seen.add(key)
            yield name, tensor


def quantized_modules(model: nn.Module) -> dict[str, QModule]:
    """Live and frozen modules by their first name, in tree order."""
    return {n[0]: m for m, n in named_modules(model).items() if isinstance(m, QModule)}


def is_quantized(model: nn.Module) -> bool:
    """Whether any module is live or frozen."""
    return any(isinstance(m, QModule) for m in model.modules())


def weight_elements(model: nn.Module) -> int:
    """Number of parameters the model stands for, quantized ones included, tied ones once."""
    quantized = {
        f"{name}.weight": m
        for name, m in quantized_modules(model).items()
        if m.frozen and m.tied_to is None
    }
    codes = sum(m.shape[0] * m.shape[1] for m in quantized.values())
    parameters = {name for name, _ in model.named_parameters()}
    return codes + sum(t.numel() for name, t in owned_tensors(model) if name in parameters)
