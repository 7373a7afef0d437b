"""Giving a quantized module another weight: of other sizes, or of another scheme."""

from __future__ import annotations

from torch import nn

from zeropoint.nn.inputs import weight_only
from zeropoint.nn.linear import QLinear
from zeropoint.nn.qmodule import PART_NAMES, QModule
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Scheme

_SIZES = {
    "linear": ("out_features", "in_features"),
    "embedding": ("num_embeddings", "embedding_dim"),
}


def exchange(module: QModule, weight: nn.Parameter | QTensor, scheme: Scheme | None = None) -> None:
    """Put another weight in the place of a module's. In place.

    weight: what `module.weight` is to be. Live: a parameter in the float module's layout. Frozen:
    a QTensor, whose scheme becomes the module's; for a module that is tied to another, the weight
    which that one has already got. scheme: of a live weight, where it becomes another.
    """
    assert isinstance(weight, QTensor) == module.frozen, "a live module stays live"
    if isinstance(weight, QTensor):
        if module.tied_to is None:
            for name in PART_NAMES.values():
                module._buffers.pop(name, None)
            module._buffers.update({PART_NAMES[s]: part for s, part in weight.parts.items()})
        assert module._parts()["weight"] is weight.packed, "the owner's weight comes first"
        module.scheme, module._dtype = weight.scheme, weight.dtype
        n, k = weight.shape
    else:
        module._parameters["weight"] = weight
        module.scheme = scheme or module.scheme
        n, k = module.float_weight().shape
    module.shape = (n, k)
    for name, size in zip(_SIZES[module.role], module.shape, strict=True):
        setattr(module, name, size)
    if isinstance(module, QLinear):
        module._weight_only = weight_only(module.scheme)
    if module.frozen:
        module.loaded()
