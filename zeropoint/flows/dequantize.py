"""From a quantized model, live or frozen, back to a float one."""

from __future__ import annotations

from torch import nn

from zeropoint.errors import StateError
from zeropoint.model.replace import replace_module
from zeropoint.model.save import remember_recipe
from zeropoint.model.walk import named_modules
from zeropoint.nn import QModule


def dequantize(model: nn.Module) -> None:
    """Back to float modules. Live: with their float weights; frozen: with the dequantized ones.
    In place.

    Raises StateError when nothing is quantized.
    """
    modules = {m: n for m, n in named_modules(model).items() if isinstance(m, QModule)}
    if not modules:
        raise StateError("there is nothing to dequantize: the model is not quantized")
    floats = {m: m.to_float() for m in modules}
    for module, names in modules.items():
        if isinstance(module, QModule) and module.tied_to is not None:
            floats[module].weight = floats[module.tied_to].weight
        replace_module(model, names, floats[module])
    remember_recipe(model, None)
