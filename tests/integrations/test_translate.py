"""Other libraries' configurations in zeropoint's words."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, QuantoConfig

import zeropoint as zp
from tests.models import build
from zeropoint.errors import RecipeError, UnknownNameError
from zeropoint.integrations.translate import (
    READERS,
    TORCHAO,
    Translation,
    from_flags,
    patterns,
    translate,
)

SKIP = ["lm_head", "*.lm_head", "lm_head.*", "*.lm_head.*"]


def said(translation: Translation) -> str:
    return "\n".join(translation.notes)


# Stand-ins for classes whose libraries are not needed: what matters is their name and fields.


class HqqConfig:
    def __init__(self, skip_modules: list[str] | None = None, **parameters: Any) -> None:
        weight = {"nbits": 4, "group_size": 64, "optimize": True, "round_zero": True}
        top = {k: parameters.pop(k) for k in [*parameters] if k not in weight}
        self.quant_method = "hqq"
        self.quant_config = {"weight_quant_params": weight | parameters, "axis": 1, **top}
        self.skip_modules = skip_modules


class AOBaseConfig:
    pass


@dataclass
class Int8WeightOnlyConfig(AOBaseConfig):
    group_size: int | None = None
    set_inductor_config: bool = True


@dataclass
class Int4WeightOnlyConfig(AOBaseConfig):
    group_size: int = 128
    int4_packing_format: str = "plain"
    extras: list[str] = field(default_factory=list)


@dataclass
class Int8DynamicActivationInt8WeightConfig(AOBaseConfig):
    granularity: str = "PerRow"


@dataclass
class Int8DynamicActivationInt4WeightConfig(AOBaseConfig):
    group_size: int = 32


@dataclass
class Float8WeightOnlyConfig(AOBaseConfig):
    weight_dtype: torch.dtype = torch.float8_e4m3fn


@dataclass
class Float8DynamicActivationFloat8WeightConfig(AOBaseConfig):
    activation_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn


class FqnToConfig(AOBaseConfig):
    pass


class TorchAoConfig:
    def __init__(self, quant_type: Any, **given: Any) -> None:
        self.quant_method = "torchao"
        self.quant_type = quant_type
        vars(self).update(given)


BNB_INT8 = {"weights": "int8", "group_size": -1, "symmetric": True, "activations": "int8"}
FP4 = {"weights": "fp4", "group_size": 64, "compute_dtype": "float32"}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bnb fp4": (BitsAndBytesConfig(load_in_4bit=True), FP4),
    "bnb nf4": (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        FP4 | {"weights": "nf4", "double_quant": True, "compute_dtype": "bfloat16"},
    ),
    "bnb int8": (BitsAndBytesConfig(load_in_8bit=True), BNB_INT8 | {"outlier_threshold": 6.0}),
    "bnb int8 without outliers": (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
        BNB_INT8,
    ),
    "bnb skip": (
        BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"]),
        FP4 | {"exclude": SKIP},
    ),
    "bnb skip nothing": (BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[]), FP4),
    "quanto int8": (QuantoConfig("int8"), {"weights": "int8"}),
    "quanto int4": (QuantoConfig("int4"), {"weights": "int4"}),
    "quanto int2": (QuantoConfig("int2"), {"weights": "int2"}),
    "quanto float8": (QuantoConfig("float8"), {"weights": "float8_e4m3fn"}),
    "quanto activations": (
        QuantoConfig("int4", activations="int8", modules_to_not_convert=["lm_head"]),
        {"weights": "int4", "activations": "int8", "exclude": SKIP},
    ),
    "quanto float8 activations": (
        QuantoConfig("float8", activations="float8"),
        {"weights": "float8_e4m3fn", "activations": "float8_e4m3fn"},
    ),
    "hqq": (HqqConfig(), {"weights": "int4", "group_size": 64, "float_zero_point": True}),
    "hqq int3": (
        HqqConfig(nbits=3, group_size=None, skip_modules=["lm_head"]),
        {"weights": "int3", "group_size": -1, "float_zero_point": True, "exclude": SKIP},
    ),
    "torchao int8": (
        TorchAoConfig(Int8WeightOnlyConfig()),
        {"weights": "int8", "group_size": -1, "symmetric": True},
    ),
    "torchao int8 grouped": (
        TorchAoConfig(Int8WeightOnlyConfig(group_size=64), modules_to_not_convert=["lm_head"]),
        {"weights": "int8", "group_size": 64, "symmetric": True, "exclude": SKIP},
    ),
    "torchao int4": (
        TorchAoConfig(Int4WeightOnlyConfig(group_size=32)),
        {"weights": "int4", "group_size": 32, "symmetric": False},
    ),
    "torchao int8 int8": (TorchAoConfig(Int8DynamicActivationInt8WeightConfig()), BNB_INT8),
    "torchao int8 int4": (
        TorchAoConfig(Int8DynamicActivationInt4WeightConfig()),
        {"weights": "int4", "group_size": 32, "symmetric": True, "activations": "int8"},
    ),
    "torchao float8": (
        TorchAoConfig(Float8WeightOnlyConfig(torch.float8_e5m2)),
        {"weights": "float8_e5m2"},
    ),
    "torchao float8 float8": (
        TorchAoConfig(Float8DynamicActivationFloat8WeightConfig()),
        {"weights": "float8_e4m3fn", "activations": "float8_e4m3fn"},
    ),
    "torchao by itself": (
        Int4WeightOnlyConfig(),
        {"weights": "int4", "group_size": 128, "symmetric": False},
    ),
    "torchao old": (
        TorchAoConfig("int4_weight_only", quant_type_kwargs={"group_size": 64}),
        {"weights": "int4", "group_size": 64, "symmetric": False},
    ),
    "torchao old int8": (TorchAoConfig("int8_dynamic_activation_int8_weight"), BNB_INT8),
}


@pytest.mark.parametrize(("config", "options"), CASES.values(), ids=CASES)
def test_options(config: Any, options: dict[str, Any]) -> None:
    translation = translate(config)
    assert translation.options == options
    shown = said(translation)
    assert f"weights={options['weights']!r}" in shown
    assert ("lm_head stay as they are" in shown) == ("exclude" in options)
    assert ("leaves them float unless told otherwise" in shown) == ("exclude" not in options)


def test_every_known_configuration_is_tried() -> None:
    tried = {type(config).__name__ for config, _ in CASES.values()}
    inner = {type(getattr(config, "quant_type", None)).__name__ for config, _ in CASES.values()}
    assert tried >= READERS.keys()
    assert inner >= TORCHAO.keys()


def test_options_are_arguments_of_load() -> None:
    given = set().union(*(options for _, options in CASES.values()))
    assert given <= inspect.signature(zp.load).parameters.keys()


def test_flags_are_the_configuration_with_its_defaults() -> None:
    four = BitsAndBytesConfig(load_in_4bit=True)
    eight = BitsAndBytesConfig(load_in_8bit=True)
    assert from_flags(load_in_4bit=True) == translate(four)
    assert from_flags(load_in_8bit=True) == translate(eight)


def test_a_subclass_is_read_as_its_base() -> None:
    class Mine(BitsAndBytesConfig):
        pass

    assert translate(Mine(load_in_4bit=True)).options == FP4


NOTES: dict[str, tuple[Any, str]] = {
    "fp4": (BitsAndBytesConfig(load_in_4bit=True), "weights='nf4' loses less at the same size"),
    "float32": (BitsAndBytesConfig(load_in_4bit=True), "also bitsandbytes' choice when none"),
    "double": (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
        "double_quant=True: the scales are 8 bits",
    ),
    "storage": (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"),
        "bnb_4bit_quant_storage=bfloat16 is ignored",
    ),
    "offload": (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True),
        "llm_int8_enable_fp32_cpu_offload is ignored",
    ),
    "fp16 weights": (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True),
        "llm_int8_has_fp16_weight is ignored",
    ),
    "threshold": (BitsAndBytesConfig(load_in_8bit=True), "is outlier_threshold=6.0: input columns"),
    "no threshold": (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
        "llm_int8_threshold=0: every input column is rounded",
    ),
    "quanto groups": (QuantoConfig("int2"), "group_size=128 for the same"),
    "quanto activations": (QuantoConfig("int8", activations="int8"), "needs a calibration first"),
    "hqq solver": (HqqConfig(), "by rounding, not by HQQ's solver"),
    "hqq axis": (HqqConfig(axis=0), "axis=0 is ignored"),
    "hqq nested": (HqqConfig(scale_quant_params={"nbits": 8}), "scale_quant_params is ignored"),
    "hqq view": (HqqConfig(view_as_float=True), "view_as_float is ignored: codes are uint8"),
    "torchao groups": (Int4WeightOnlyConfig(), "not a multiple of 128 is an error here"),
    "torchao activations": (Int8DynamicActivationInt8WeightConfig(), "one scale per token"),
    "torchao field": (
        Int8DynamicActivationInt8WeightConfig(granularity="PerTensor"),
        "has no counterpart and is ignored: granularity='PerTensor'",
    ),
    "torchao list": (Int4WeightOnlyConfig(extras=["x"]), r"is ignored: extras=['x']"),
    "torchao old field": (
        TorchAoConfig("int8_weight_only", quant_type_kwargs={"layout": "tiles"}),
        "is ignored: layout='tiles'",
    ),
    "torchao embeddings": (
        TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True),
        "include_input_output_embeddings: embeddings and the head are int8",
    ),
    "torchao untie": (
        TorchAoConfig(Int8WeightOnlyConfig(), untie_embedding_weights=True),
        "untie_embedding_weights is ignored",
    ),
}


@pytest.mark.parametrize(("config", "note"), NOTES.values(), ids=NOTES)
def test_what_differs_is_said(config: Any, note: str) -> None:
    assert note in said(translate(config))


@pytest.mark.parametrize(
    "config",
    [BitsAndBytesConfig(load_in_4bit=True), QuantoConfig(), HqqConfig(), TorchAoConfig("x")],
    ids=lambda c: type(c).__name__,
)
def test_a_field_of_a_newer_version_is_said_to_be_ignored(config: Any) -> None:
    if isinstance(config, TorchAoConfig):
        config.quant_type = Int8WeightOnlyConfig()
    config.from_the_future = 7
    assert "from_the_future=7 is not known here and ignored" in said(translate(config))


def test_defaults_of_torchao_are_no_notes() -> None:
    assert "ignored" not in said(translate(Int8WeightOnlyConfig()))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown": (
        SimpleNamespace(),
        UnknownNameError,
        "a SimpleNamespace is not understood; known: BitsAndBytesConfig, QuantoConfig, HqqConfig, "
        "TorchAoConfig. Say it in zeropoint's words: weights='int4'",
    ),
    "dictionary": ({"load_in_4bit": True}, UnknownNameError, "a dict is not understood"),
    "neither": (BitsAndBytesConfig(), RecipeError, "neither load_in_4bit nor load_in_8bit is set"),
    "type": (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="int4"),
        RecipeError,
        "bnb_4bit_quant_type='int4' is not one of 'nf4', 'fp4'",
    ),
    "hqq 1 bit": (HqqConfig(nbits=1), RecipeError, "nbits=1, but .* 2 bits or more; use nbits=2"),
    "torchao": (
        TorchAoConfig(FqnToConfig()),
        UnknownNameError,
        r"TorchAoConfig\(FqnToConfig\) is not understood; known: Int8WeightOnlyConfig, .* recipe",
    ),
    "torchao string": (
        TorchAoConfig("uint4_weight_only"),
        UnknownNameError,
        r"TorchAoConfig\(uint4_weight_only\) is not understood",
    ),
    "regex": (
        QuantoConfig(modules_to_not_convert=["(q|k)_proj"]),
        RecipeError,
        r"'\(q\|k\)_proj', a module not to be quantized, has no counterpart .* give exclude=",
    ),
}


@pytest.mark.parametrize(("config", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        translate(config)


def test_settings_by_layer_of_hqq_are_refused() -> None:
    config = HqqConfig()
    config.quant_config = {"self_attn.q_proj": config.quant_config}
    with pytest.raises(RecipeError, match="settings for each kind of layer; write them as a recip"):
        translate(config)


def test_both_flags_are_refused() -> None:
    with pytest.raises(RecipeError, match="are both set; choose one, or weights='nf4' / 'int8'"):
        from_flags(load_in_4bit=True, load_in_8bit=True)


NAMES = [
    "lm_head",
    "model.lm_head",
    "lm_head.dense",
    "model.embed_tokens",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.gate_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
]


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("lm_head", NAMES[:3]),
        ("gate", ["model.layers.1.mlp.gate"]),
        ("self_attn", NAMES[6:]),
        ("model.layers.1", NAMES[4:7]),
        ("model.layers.1.", NAMES[4:7]),
        (r"model\.layers\.\d+\.self_attn", NAMES[6:]),
        ("model.*.gate", ["model.layers.1.mlp.gate"]),
        ("head", []),
    ],
)
def test_a_name_to_skip_matches_at_module_boundaries(name: str, skipped: list[str]) -> None:
    found = [n for n in NAMES if any(fnmatchcase(n, p) for p in patterns([name]))]
    assert found == skipped


@pytest.mark.parametrize("name", ["lm_head", "model.layers.1", r"model\.layers\.\d+\.self_attn"])
def test_what_transformers_skips_is_skipped(name: str) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    theirs = {n for n in NAMES if not should_convert_module(n, [name])}
    if name == "model.layers.1":  # transformers 5.20 takes that for a prefix of layer 11's name
        theirs = {n for n in theirs if "layers.11" not in n}
    ours = {n for n in NAMES if any(fnmatchcase(n, p) for p in patterns([name]))}
    assert theirs and theirs <= ours


def test_a_translation_quantizes_a_model_as_the_original_does() -> None:
    """quanto's int8, in its own arithmetic: symmetric, one scale per channel."""
    options = translate(QuantoConfig("int8", modules_to_not_convert=["lm_head"])).options
    model, original = build("llama"), build("llama")
    zp.quantize(model, **options, strict=False)  # of four patterns for a name, one matches
    zp.freeze(model)
    assert type(model.lm_head) is torch.nn.Linear
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        weight = original.model.layers[1].get_submodule(name).weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        image = model.model.layers[1].get_submodule(name).weight.dequantize()
        torch.testing.assert_close(image, (weight / scale).round() * scale)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, zeropoint.integrations.translate as c; c.from_flags(load_in_4bit=True); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
