"""Quantization configurations of other libraries, in the words of `zp.load` and `zp.quantize`.

    QuantoConfig(weights="float8", modules_to_not_convert=["lm_head"])
        ->  weights="float8_e4m3fn", exclude=["lm_head", "*.lm_head", ...]

Configurations are recognised by the names of their classes, so nothing of theirs is imported and
none of the libraries need be installed. What has no counterpart is said in words, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

from zeropoint.errors import RecipeError, UnknownNameError

BNB_BLOCK = 64  # values that share a scale: bitsandbytes' default, and all that transformers uses
PER_CHANNEL = -1  # scheme.PER_CHANNEL, whose file imports torch


@dataclass(frozen=True, kw_only=True)
class Translation:
    """options: keyword arguments of `zp.load` (weights, group_size, symmetric, double_quant,
    compute_dtype, activations, outlier_threshold, exclude), only those that are given.

    notes: what it was translated to, and every field that differs here or is ignored, in words.
    """

    options: dict[str, Any]
    notes: tuple[str, ...]


def translate(config: Any) -> Translation:
    """What a configuration of bitsandbytes, optimum-quanto, HQQ or torchao asks for.

    config: transformers' BitsAndBytesConfig, QuantoConfig, HqqConfig or TorchAoConfig, or one of
    torchao's own (`TORCHAO`).
    Raises UnknownNameError (another configuration), RecipeError (one that contradicts itself, or
    asks for what cannot be had).

    >>> class QuantoConfig:
    ...     weights, activations, modules_to_not_convert = "int8", None, ["lm_head"]
    >>> translate(QuantoConfig()).options
    {'weights': 'int8', 'exclude': ['lm_head', '*.lm_head', 'lm_head.*', '*.lm_head.*']}
    """
    for kind in type(config).__mro__:
        if kind.__name__ in READERS:
            return READERS[kind.__name__](config)
        if kind.__name__ in TORCHAO:
            return _torchao(SimpleNamespace(quant_type=config))
    raise UnknownNameError(
        f"quantization_config: a {type(config).__name__} is not understood; known: "
        f"{', '.join(READERS)}. Say it in zeropoint's words: weights='int4', group_size=..., "
        "exclude=[...] or recipe=..."
    )


def from_flags(load_in_4bit: bool = False, load_in_8bit: bool = False) -> Translation:
    """What transformers' load_in_4bit=True and load_in_8bit=True ask for.

    Raises RecipeError when both are set, or neither.

    >>> from_flags(load_in_8bit=True).options["outlier_threshold"]
    6.0
    """
    return _bits_and_bytes(SimpleNamespace(load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit))


# --- bitsandbytes ---


def _bits_and_bytes(config: Any) -> Translation:
    four, eight = _get(config, "load_in_4bit", False), _get(config, "load_in_8bit", False)
    if four and eight:
        raise RecipeError(
            "load_in_4bit and load_in_8bit are both set; choose one, or weights='nf4' / 'int8'"
        )
    if not four and not eight:
        raise RecipeError(
            "neither load_in_4bit nor load_in_8bit is set, so there is nothing to quantize; set "
            "one, or leave the configuration out"
        )
    options, notes = _four_bits(config) if four else _eight_bits(config)
    if _get(config, "llm_int8_enable_fp32_cpu_offload", False):
        notes.append(
            "llm_int8_enable_fp32_cpu_offload is ignored: quantized layers run on the CPU as well"
        )
    skipped = _get(config, "llm_int8_skip_modules", None)
    _skip(options, notes, skipped, "llm_int8_skip_modules", "bitsandbytes")
    known = (
        *("quant_method", "_load_in_4bit", "_load_in_8bit", "load_in_4bit", "load_in_8bit"),
        *("llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload"),
        *("llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type"),
        *("bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
    )
    return Translation(options=options, notes=(*notes, *_unknown_fields(config, known)))


def _four_bits(config: Any) -> tuple[dict[str, Any], list[str]]:
    kind = _get(config, "bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise RecipeError(f"bnb_4bit_quant_type={kind!r} is not one of 'nf4', 'fp4'")
    compute = _name(_get(config, "bnb_4bit_compute_dtype", "float32"))
    storage = _name(_get(config, "bnb_4bit_quant_storage", "uint8"))
    options = {"weights": kind, "group_size": BNB_BLOCK, "compute_dtype": compute}
    notes = [
        f"load_in_4bit is weights={kind!r}, group_size={BNB_BLOCK}: one scale for {BNB_BLOCK} "
        "values of a row (bitsandbytes counts through the flattened weight, which is the same "
        f"where rows are a multiple of {BNB_BLOCK}; elsewhere it is an error here)",
        f"bnb_4bit_compute_dtype is compute_dtype={compute!r}"
        + (
            ", also bitsandbytes' choice when none is given; without it layers compute in the "
            "model's own dtype"
            if compute == "float32"
            else ""
        ),
    ]
    if kind == "fp4":
        notes.append(
            "fp4 is bitsandbytes' choice when none is given; weights='nf4' loses less at the same "
            "size"
        )
    if _get(config, "bnb_4bit_use_double_quant", False):
        options["double_quant"] = True
        notes.append("bnb_4bit_use_double_quant is double_quant=True: the scales are 8 bits")
    if storage != "uint8":
        notes.append(f"bnb_4bit_quant_storage={storage} is ignored: codes are stored as uint8")
    return options, notes


def _eight_bits(config: Any) -> tuple[dict[str, Any], list[str]]:
    threshold = float(_get(config, "llm_int8_threshold", 6.0))
    options = _int8(None) | {"activations": "int8"}
    if threshold:
        options["outlier_threshold"] = threshold
    notes = [
        "load_in_8bit is LLM.int8(): weights='int8', one scale per output channel, "
        "activations='int8', one scale per token",
        f"llm_int8_threshold is outlier_threshold={threshold}: input columns that reach it stay "
        "float"
        if threshold
        else "llm_int8_threshold=0: every input column is rounded, there is no outlier_threshold",
        "bitsandbytes casts inputs to float16; here they keep the model's dtype",
    ]
    if _get(config, "llm_int8_has_fp16_weight", False):
        notes.append(
            "llm_int8_has_fp16_weight is ignored: for weights that can be trained, load without it "
            "and call zp.quantize(model), which keeps the floats until zp.freeze(model)"
        )
    return options, notes


# --- optimum-quanto ---

_QUANTO_FLOAT8 = {"float8": "float8_e4m3fn"}


def _quanto(config: Any) -> Translation:
    asked, inputs = config.weights, _get(config, "activations", None)
    weights = _QUANTO_FLOAT8.get(asked, asked)
    options: dict[str, Any] = {"weights": weights}
    notes = [f"QuantoConfig's weights={asked!r} is weights={weights!r}"]
    if weights in ("int4", "int2"):
        notes.append(
            "quanto's groups have 128 values, or fewer where that does not divide a row; here "
            "they have 32, which is a little larger and more accurate: group_size=128 for the same"
        )
    if inputs is not None:
        options["activations"] = _QUANTO_FLOAT8.get(inputs, inputs)
        notes.append(
            f"activations={inputs!r} is activations={options['activations']!r}, with a scale for "
            "each token as it comes; quanto has one for each layer, and needs a calibration first"
        )
    _skip(options, notes, _get(config, "modules_to_not_convert", None), _NOT_CONVERTED, "quanto")
    known = ("quant_method", "weights", "activations", _NOT_CONVERTED)
    return Translation(options=options, notes=(*notes, *_unknown_fields(config, known)))


# --- HQQ ---


def _hqq(config: Any) -> Translation:
    parameters = _get(config, "quant_config", {})
    weight = parameters.get("weight_quant_params")
    if not isinstance(weight, dict):
        raise RecipeError(
            "HqqConfig with dynamic_config has settings for each kind of layer; write them as a "
            "recipe: recipe=zp.Recipe(rules=...), one rule for each"
        )
    bits, size = weight["nbits"], weight.get("group_size")
    if bits < 2:
        raise RecipeError(f"HqqConfig: nbits={bits}, but formats have 2 bits or more; use nbits=2")
    options: dict[str, Any] = {
        "weights": f"int{bits}",
        "group_size": size or PER_CHANNEL,
        "float_zero_point": True,
    }
    notes = [
        f"HqqConfig is weights='int{bits}', group_size={options['group_size']}, "
        "float_zero_point=True",
        "codes are chosen by rounding, not by HQQ's solver: algorithm='hqq' is that, and "
        "algorithm='mse' loses less",
    ]
    if parameters.get("axis", _get(config, "axis", 1)) == 0:
        notes.append("axis=0 is ignored: groups lie along the input dimension, HQQ's axis=1")
    for name in ("scale_quant_params", "zero_quant_params"):
        if parameters.get(name) is not None:
            notes.append(f"{name} is ignored: scales and zero points are stored as they are")
    for name, here in (("view_as_float", "codes are uint8"), ("offload_meta", "scales stay put")):
        if parameters.get(name, _get(weight, name, False)):
            notes.append(f"{name} is ignored: {here}")
    _skip(options, notes, _get(config, "skip_modules", None), "skip_modules", "HQQ")
    known = ("quant_method", "quant_config", "skip_modules")
    return Translation(options=options, notes=(*notes, *_unknown_fields(config, known)))


# --- torchao ---


def _int8(inner: Any) -> dict[str, Any]:
    size = _get(inner, "group_size", None) or PER_CHANNEL
    return {"weights": "int8", "group_size": size, "symmetric": True}


def _int4(inner: Any) -> dict[str, Any]:
    size = _get(inner, "group_size", 128)
    return {"weights": "int4", "group_size": size, "symmetric": False}


def _int8_int4(inner: Any) -> dict[str, Any]:
    size = _get(inner, "group_size", 32)
    return {"weights": "int4", "group_size": size, "symmetric": True, "activations": "int8"}


def _float8(inner: Any) -> dict[str, Any]:
    return {"weights": _name(_get(inner, "weight_dtype", "float8_e4m3fn"))}


def _float8_float8(inner: Any) -> dict[str, Any]:
    inputs = _name(_get(inner, "activation_dtype", "float8_e4m3fn"))
    return {**_float8(inner), "activations": inputs}


TORCHAO: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Int8WeightOnlyConfig": _int8,
    "Int4WeightOnlyConfig": _int4,
    "Int8DynamicActivationInt8WeightConfig": lambda inner: _int8(None) | {"activations": "int8"},
    "Int8DynamicActivationInt4WeightConfig": _int8_int4,
    "Float8WeightOnlyConfig": _float8,
    "Float8DynamicActivationFloat8WeightConfig": _float8_float8,
}
"""torchao's own configurations, by class name."""

_TORCHAO_OLD = {
    "int8_weight_only": "Int8WeightOnlyConfig",
    "int4_weight_only": "Int4WeightOnlyConfig",
    "int8_dynamic_activation_int8_weight": "Int8DynamicActivationInt8WeightConfig",
    "int8_dynamic_activation_int4_weight": "Int8DynamicActivationInt4WeightConfig",
    "float8_weight_only": "Float8WeightOnlyConfig",
    "float8_dynamic_activation_float8_weight": "Float8DynamicActivationFloat8WeightConfig",
}
"""The strings that older versions of transformers took for them."""

_TORCHAO_USED = ("group_size", "weight_dtype", "activation_dtype")


def _torchao(config: Any) -> Translation:
    inner: Any = config.quant_type
    asked = type(inner).__name__
    if isinstance(inner, str):
        inner, asked = SimpleNamespace(**_get(config, "quant_type_kwargs", {})), inner
    name = _TORCHAO_OLD.get(asked, asked)
    if name not in TORCHAO:
        raise UnknownNameError(
            f"TorchAoConfig({asked}) is not understood; known: {', '.join(TORCHAO)}. Say it in "
            "zeropoint's words: weights='int4', group_size=..., or a recipe for settings that "
            "differ by module"
        )
    options = TORCHAO[name](inner)
    shown = ", ".join(f"{k}={v!r}" for k, v in options.items())
    notes = [f"{asked} is {shown}"]
    if options.get("group_size", PER_CHANNEL) != PER_CHANNEL:
        notes.append(
            f"a row that is not a multiple of {options['group_size']} is an error here; torchao "
            "leaves such a layer as it is"
        )
    if "activations" in options:
        notes.append("inputs have one scale per token, symmetric")
    notes += [
        f"{name} has no counterpart and is ignored: {field}={value!r}"
        for field, value in _given(inner)
        if field not in _TORCHAO_USED
    ]
    if _get(config, "include_input_output_embeddings", False):
        notes.append(
            "include_input_output_embeddings: embeddings and the head are int8, one scale per row"
        )
    if _get(config, "untie_embedding_weights", False):
        notes.append("untie_embedding_weights is ignored: tied weights stay tied, in one scheme")
    _skip(options, notes, _get(config, _NOT_CONVERTED, None), _NOT_CONVERTED, "torchao")
    known = (
        *("quant_method", "quant_type", "quant_type_kwargs", _NOT_CONVERTED),
        *("include_input_output_embeddings", "untie_embedding_weights"),
    )
    return Translation(options=options, notes=(*notes, *_unknown_fields(config, known)))


_NOT_CONVERTED = "modules_to_not_convert"

READERS: dict[str, Callable[[Any], Translation]] = {
    "BitsAndBytesConfig": _bits_and_bytes,
    "QuantoConfig": _quanto,
    "HqqConfig": _hqq,
    "TorchAoConfig": _torchao,
}
"""The configurations of transformers that are understood, by class name."""


# --- what they share ---


GLOBS = {r"\d+": "*", ".*": "*", ".+": "*", r"\.": "."}
_REGULAR = re.compile("|".join(map(re.escape, GLOBS)))


def patterns(names: Iterable[str]) -> list[str]:
    """`fnmatch` patterns for a list of modules to skip: each name as a whole module, a leaf, a
    prefix, or in the middle of a path.

    Parts of regular expressions that have an fnmatch counterpart are translated. Raises RecipeError
    for the others.

    >>> patterns(["lm_head"])
    ['lm_head', '*.lm_head', 'lm_head.*', '*.lm_head.*']
    >>> patterns([r"layers\\.\\d+\\.mlp"])[0]
    'layers.*.mlp'
    """
    result = []
    for name in names:
        plain = _REGULAR.sub(lambda found: GLOBS[found[0]], name.removesuffix("."))
        if not re.fullmatch(r"[\w.*/-]+", plain):
            raise RecipeError(
                f"{name!r}, a module not to be quantized, has no counterpart among fnmatch "
                "patterns; give exclude=['*.some.*'] instead"
            )
        result += [plain, f"*.{plain}", f"{plain}.*", f"*.{plain}.*"]
    return list(dict.fromkeys(result))


def _skip(
    options: dict[str, Any], notes: list[str], names: list[str] | None, field: str, theirs: str
) -> None:
    """Add the modules to leave alone to `options` and `notes`. In place."""
    wide = "become int8, one scale per row"
    if names:
        options["exclude"] = patterns(names)
        notes.append(
            f"{field} is exclude: modules named {', '.join(names)} stay as they are; embeddings "
            f"that are not among them (or tied to one) {wide}, where {theirs} leaves them float"
        )
    else:
        notes.append(
            f"embeddings and the head {wide}, where {theirs} leaves them float unless told "
            "otherwise; exclude='lm_head' keeps the head, and what is tied to it"
        )


def _get(config: Any, field: str, default: Any) -> Any:
    """A field, by its default where it is missing or None."""
    value = config.get(field) if isinstance(config, dict) else getattr(config, field, None)
    return default if value is None else value


def _name(dtype: Any) -> str:
    """torch.bfloat16 -> "bfloat16"; strings stay."""
    return str(dtype).removeprefix("torch.")


def _given(config: Any) -> list[tuple[str, Any]]:
    """Fields of a dataclass that differ from their default; all attributes of another object."""
    if not is_dataclass(config):
        return list(vars(config).items())
    given = []
    for field in fields(config):
        made = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(config, field.name)
        if made is MISSING or value != made:
            given.append((field.name, value))
    return given


def _unknown_fields(config: Any, known: tuple[str, ...]) -> list[str]:
    return [
        f"{name}={value!r} is not known here and ignored"
        for name, value in vars(config).items()
        if name not in known
    ]
