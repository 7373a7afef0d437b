"""From a frozen model to a checkpoint folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zeropoint.checkpoints import native
from zeropoint.errors import StateError
from zeropoint.model.frameworks import FRAMEWORKS
from zeropoint.model.walk import named_modules, quantized_modules
from zeropoint.nn import PART_NAMES, QLinear, QModule
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Recipe, Rule

_RECIPE = "_zeropoint_recipe"
_ALGORITHM = "_zeropoint_algorithm"


def remember_recipe(model: nn.Module, recipe: Recipe | None) -> None:
    """Keep the recipe on the model (None forgets it), so that it can be saved. In place.

    Nobody has chosen codes by it yet: the algorithm is forgotten.
    """
    remember_algorithm(model, None)
    if recipe is not None:
        setattr(model, _RECIPE, recipe)
    elif hasattr(model, _RECIPE):
        delattr(model, _RECIPE)
    for framework in FRAMEWORKS:
        if recipe is not None:
            framework.adopt(model, recipe)
        else:
            framework.release(model)


def remember_algorithm(model: nn.Module, name: str | None) -> None:
    """Keep how all codes of the model were chosen; None: unknown, or in several ways. In place."""
    if name is not None:
        setattr(model, _ALGORITHM, name)
    elif hasattr(model, _ALGORITHM):
        delattr(model, _ALGORITHM)


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe the model was quantized by; for a part of a model, one rule per module."""
    recipe = getattr(model, _RECIPE, None)
    if isinstance(recipe, Recipe):
        return recipe
    modules = quantized_modules(model)
    return Recipe(rules=tuple(Rule(match=n, scheme=m.scheme) for n, m in modules.items()))


def save(
    model: nn.Module, path: str | Path, *, tokenizer: Any = None, overwrite: bool = False
) -> None:
    """Write a frozen model as a checkpoint folder: safetensors, config.json, manifest, and the
    tokenizer if given.

    Written to a sibling folder and renamed, so a kill at any moment leaves the old checkpoint or
    the new one.
    overwrite: replace a zeropoint checkpoint at `path`; any other non-empty folder is always
    refused.
    Raises StateError (not frozen), CheckpointError (exists, read-only, no space).
    """
    with native.write(Path(path), contents_of(model), overwrite=overwrite) as folder:
        generation_config = getattr(model, "generation_config", None)
        if generation_config is not None:
            generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def contents_of(model: nn.Module) -> native.Contents:
    """Everything a checkpoint of this model holds. Raises StateError when it is not frozen."""
    quantized = quantized_modules(model)
    live = next((name for name, m in quantized.items() if not m.frozen), None)
    if not quantized:
        raise StateError(
            "the model is not quantized: call zp.quantize(model) and zp.freeze(model), "
            "or keep it as it is with model.save_pretrained(path)"
        )
    if live is not None:
        raise StateError(f"{live} still has float weights; call zp.freeze(model) first")
    modules = named_modules(model)
    first_name = {m: names[0] for m, names in modules.items()}
    qweights: dict[str, QTensor] = {}
    tied: dict[str, str] = {}
    for module, names in modules.items():
        if isinstance(module, QModule):
            owner = f"{first_name[module.tied_to or module]}.weight"
            if module.tied_to is None:
                qweights[owner] = module.qweight
            tied |= {f"{n}.weight": owner for n in names if f"{n}.weight" != owner}
    parts = {
        f"{name}.{part}"
        for module, names in modules.items()
        if isinstance(module, QModule)
        for name in names
        for part in PART_NAMES.values()
    }
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in parts:
            continue
        owner = owners.setdefault(id(tensor), name)
        if owner == name:
            tensors[name] = tensor
        else:
            tied[name] = owner
    return native.Contents(
        qweights=qweights,
        tensors=_without_shared_storage(tensors),
        tied=tied,
        recipe=recipe_of(model),
        config=_config(model),
        inputs={
            names[0]: asdict(module.input_range)
            for module, names in modules.items()
            if isinstance(module, QLinear) and module.input_range is not None
        },
        algorithm=getattr(model, _ALGORITHM, None),
    )


def _without_shared_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that are views of another's memory, which safetensors refuses to write."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.detach().clone() if storage in seen else tensor.detach()
        seen.add(storage)
    return result


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return {}
    data: dict[str, Any] = json.loads(config.to_json_string())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype is not None:
        data["dtype"] = str(dtype).removeprefix("torch.")
    return data | {"architectures": [type(model).__name__]}
