"""`zp.load`: from a source to (model, tokenizer), quantized on the way where that is asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeropoint.errors import RecipeError, SourceError
from zeropoint.flows.planned import Patterns
from zeropoint.flows.ptq import freeze, quantize
from zeropoint.integrations.placement import place
from zeropoint.integrations.translate import from_flags, translate
from zeropoint.model import load as plain
from zeropoint.model.pages import collect
from zeropoint.model.source import resolve
from zeropoint.model.walk import is_quantized
from zeropoint.scheme import Recipe


def load(
    source: str | Path,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    weights: str | None = None,
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    float_zero_point: bool | None = None,
    double_quant: bool | None = None,
    activations: str | None = None,
    outlier_threshold: float | None = None,
    compute_dtype: str | torch.dtype | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    recipe: Recipe | None = None,
    strict: bool = True,
    algorithm: str = "rtn",
    quantization_config: Any = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    offload_folder: str | Path | None = None,
    task: str | None = None,
    model: nn.Module | None = None,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, in evaluation mode.
    The tokenizer is None when the source has none.

    source: a folder (zeropoint or float checkpoint), a hub id, a .gguf file, or package:NAME.
    dtype: of float weights and activations; "auto" keeps the stored one. device_map: one device,
    "auto", or modules' names to devices, "cpu" or "disk" (with offload_folder=). weights to strict:
    quantize while loading, by the arguments of `zp.quantize`; memory then holds the quantized model
    and one float weight. algorithm: "rtn", "mse" or "hqq". quantization_config: a ZeropointConfig,
    or one of transformers' for bitsandbytes, quanto, HQQ or torchao, which is translated and the
    translation printed. load_in_4bit, load_in_8bit: as bitsandbytes has them. task: a transformers
    pipeline task ("text-generation" ...) to choose the class; by default the class that the
    configuration names. model: for a zeropoint checkpoint of a module that is not a transformers
    model, a float module of the same structure; it is filled in place and returned.
    Raises SourceError, CheckpointError, UnknownNameError, and what `zp.quantize` raises.
    """
    options: dict[str, Any] = {
        "weights": weights,
        "group_size": group_size,
        "symmetric": symmetric,
        "float_zero_point": float_zero_point,
        "double_quant": double_quant,
        "activations": activations,
        "outlier_threshold": outlier_threshold,
        "compute_dtype": compute_dtype,
        "include": include,
        "exclude": exclude,
        "recipe": recipe,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if not (given or quantization_config is not None or load_in_4bit or load_in_8bit):
        if device_map is not None and resolve(source).kind == "native":
            loaded, tokenizer = plain.load(source, dtype, task=task, model=model)
            place(loaded, device_map, offload_folder)
            return loaded, tokenizer
        return plain.load(
            source, dtype, device_map, task=task, model=model, offload_folder=offload_folder
        )
    config = _config(given, quantization_config, load_in_4bit, load_in_8bit, strict, algorithm)
    if model is not None:
        raise SourceError("model= is for checkpoints that are quantized already; leave weights out")
    found = resolve(source)
    if found.kind == "native":
        raise SourceError(f"{source} is quantized already; leave {', '.join(given) or 'it'} out")
    tokenizer = plain.load_tokenizer(found)  # before the model: from a .gguf it takes much memory
    collect()
    try:
        loaded = plain.load_float(
            found, plain.float_dtype(dtype), None, task, quantization_config=config
        )
    except SourceError as e:
        raise config.error or e from e
    if not is_quantized(loaded):
        quantize(loaded, recipe=config.recipe, strict=config.strict, **config.given)
        freeze(loaded, config.algorithm)
    place(loaded, device_map, offload_folder)
    collect()
    return loaded.eval(), tokenizer


def _config(
    given: dict[str, Any],
    quantization_config: Any,
    load_in_4bit: bool,
    load_in_8bit: bool,
    strict: bool,
    algorithm: str,
) -> Any:
    """A ZeropointConfig of whatever says how to quantize; prints a translation. Raises RecipeError
    when there are two.
    """
    from zeropoint.integrations.config import ZeropointConfig

    flags = load_in_4bit or load_in_8bit
    says = [*given, *(["load_in_4bit / load_in_8bit"] if flags else [])]
    if quantization_config is not None and says:
        raise RecipeError(f"give either quantization_config, or {', '.join(says)}")
    if isinstance(quantization_config, ZeropointConfig):
        return quantization_config
    if quantization_config is None and not flags:
        return ZeropointConfig(**given, strict=strict, algorithm=algorithm)
    if flags and "weights" in given:
        raise RecipeError(f"weights={given['weights']!r} and load_in_4bit / load_in_8bit; give one")
    translation = (
        from_flags(load_in_4bit, load_in_8bit) if flags else translate(quantization_config)
    )
    words = ", ".join(f"{name}={value!r}" for name, value in translation.options.items())
    print("\n  ".join([f"zeropoint: {words}", *translation.notes]), file=sys.stderr)
    taken = translation.options | given
    advised = taken.pop("exclude", ()) if "exclude" not in given else ()
    config = ZeropointConfig(**taken, strict=strict, algorithm=algorithm)
    config.advised = tuple(advised)
    return config
