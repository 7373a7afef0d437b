"""`zp.load` with weights=, other libraries' configurations, and device maps."""

from __future__ import annotations

import pytest
import torch
from transformers import BitsAndBytesConfig, HqqConfig, QuantoConfig

import zeropoint as zp
from tests.models import build, continuation, outputs
from zeropoint.errors import RecipeError, SourceError, UnknownNameError, UnusedRuleError
from zeropoint.nn import QModule


@pytest.fixture
def folder(tmp_path):
    build("llama-tied").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def quantized(**options):
    model = build("llama-tied")
    zp.quantize(model, **options)
    zp.freeze(model)
    return model


def schemes(model):
    return {n: str(m.scheme) for n, m in model.named_modules() if isinstance(m, QModule)}


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int8"},
        {"weights": "nf4", "double_quant": True, "compute_dtype": torch.bfloat16},
        {"weights": "int4", "group_size": 64, "symmetric": True, "exclude": ["*.v_proj"]},
        {"weights": "int2", "group_size": 64, "float_zero_point": True},
        {"weights": "int8", "activations": "int8", "outlier_threshold": 6.0},
        {"weights": "bfloat16"},
        {"recipe": zp.Recipe(rules=(zp.Rule(match="*", scheme=zp.Scheme.of("int8")),))},
    ],
    ids=str,
)
def test_options_are_those_of_quantize(options, folder):
    loaded, tokenizer = zp.load(folder, **options)
    assert tokenizer is None and not loaded.training
    expected = quantized(**options)
    assert schemes(loaded) == schemes(expected)
    assert torch.equal(outputs(loaded), outputs(expected))


def test_a_searching_algorithm(folder):
    loaded, _ = zp.load(folder, weights="int4", algorithm="mse")
    expected = build("llama-tied")
    zp.quantize(expected, "int4")
    zp.freeze(expected, "mse")
    assert torch.equal(outputs(loaded), outputs(expected))


def test_a_config_instead_of_options(folder):
    config = zp.ZeropointConfig("int4", group_size=64)
    loaded, _ = zp.load(folder, quantization_config=config)
    assert schemes(loaded) == schemes(quantized(weights="int4", group_size=64))


def test_nothing_asked_for_is_a_float_model(folder):
    loaded, _ = zp.load(folder)
    assert not schemes(loaded)
    assert torch.equal(outputs(loaded), outputs(build("llama-tied")))


# --- what users of other libraries write ---


def test_load_in_4bit(folder, capsys):
    loaded, _ = zp.load(folder, load_in_4bit=True)
    assert schemes(loaded)["model.layers.0.mlp.up_proj"] == "fp4 g64, computed in float32"
    assert "zeropoint: weights='fp4', group_size=64" in capsys.readouterr().err
    assert continuation(loaded).shape[1] == continuation(build("llama-tied")).shape[1]


def test_load_in_8bit(folder, capsys):
    loaded, _ = zp.load(folder, load_in_8bit=True)
    name = "model.layers.0.mlp.up_proj"
    assert schemes(loaded)[name] == "int8 per channel, int8 activations below 6"
    assert "LLM.int8()" in capsys.readouterr().err


def test_bits_and_bytes_config(folder, capsys):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    loaded, _ = zp.load(folder, quantization_config=config)
    assert schemes(loaded)["model.layers.0.mlp.up_proj"] == (
        "nf4 g64 double quant, computed in bfloat16"
    )
    assert "bnb_4bit_use_double_quant is double_quant=True" in capsys.readouterr().err


def hqq_config():
    """transformers makes an HqqConfig only where hqq is installed."""
    config = HqqConfig.__new__(HqqConfig)
    config.__dict__ |= {
        "quant_method": "hqq",
        "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}},
        "skip_modules": ["lm_head"],
    }
    return config


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (lambda: QuantoConfig(weights="int4"), "int4 g32 asymmetric"),
        (hqq_config, "int4 g64 float zero point"),
    ],
    ids=["quanto", "hqq"],
)
def test_other_libraries_configs(config, scheme, folder, capsys):
    loaded, _ = zp.load(folder, quantization_config=config())
    assert schemes(loaded)["model.layers.0.mlp.up_proj"] == scheme
    assert capsys.readouterr().err.startswith("zeropoint: weights='int4'")


def test_a_skip_list_that_names_modules_the_model_lacks_is_advice(folder):
    config = QuantoConfig(weights="int8", modules_to_not_convert=["lm_head", "v_proj", "score"])
    loaded, _ = zp.load(folder, quantization_config=config)
    kept = schemes(build_all := quantized(weights="int8")).keys() - schemes(loaded).keys()
    assert "model.layers.0.self_attn.v_proj" in kept and "lm_head" in kept
    assert build_all.lm_head.tied_to is not None  # a tied head takes the embedding with it
    assert "model.embed_tokens" in kept


# --- places ---


def split(folder_for_disk=None):
    """The embedding and head in memory, a layer on disk, the rest in memory."""
    return {
        "model.embed_tokens": "cpu",
        "lm_head": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }


@pytest.mark.parametrize("what", ["float, quantized on the way", "saved by zeropoint"])
def test_layers_on_disk_answer_alike(what, folder, tmp_path):
    expected = quantized(weights="int4")
    options = {"weights": "int4"}
    if what == "saved by zeropoint":
        zp.save(expected, tmp_path / "saved")
        folder, options = tmp_path / "saved", {}
    loaded, _ = zp.load(folder, device_map=split(), offload_folder=tmp_path / "offload", **options)
    layer = loaded.model.layers[0]
    assert all(t.device.type == "meta" for t in (*layer.parameters(), *layer.buffers()))
    for _ in range(2):
        assert torch.equal(outputs(loaded), outputs(expected))
    assert torch.equal(continuation(loaded), continuation(expected))
    assert all(t.device.type == "meta" for t in (*layer.parameters(), *layer.buffers()))


def test_a_tied_weight_on_disk(folder, tmp_path):
    places = split() | {"model.embed_tokens": "disk", "lm_head": "disk"}
    loaded, _ = zp.load(
        folder, weights="int8", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(outputs(loaded), outputs(quantized(weights="int8")))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu")], ids=str)
def test_one_device(device_map, folder, tmp_path):
    loaded, _ = zp.load(folder, weights="int8", device_map=device_map)
    assert torch.equal(outputs(loaded), outputs(quantized(weights="int8")))
    zp.save(loaded, tmp_path / "saved")
    again, _ = zp.load(tmp_path / "saved", device_map=device_map)
    assert torch.equal(outputs(again), outputs(loaded))


def test_from_pretrained_takes_a_device_map_too(folder):
    loaded = type(build("llama-tied")).from_pretrained(
        folder, device_map="auto", quantization_config=zp.ZeropointConfig("int8")
    )
    assert torch.equal(outputs(loaded), outputs(quantized(weights="int8")))


# --- what goes wrong ---


def test_disk_needs_a_folder(folder):
    with pytest.raises(SourceError, match="device_map puts modules on disk; give offload_folder="):
        zp.load(folder, weights="int8", device_map=split())


def test_a_device_map_with_holes(folder, tmp_path):
    places = split()
    del places["model.layers.1"]
    with pytest.raises((SourceError, ValueError), match=r"layers.1|no device"):
        zp.load(folder, weights="int8", device_map=places, offload_folder=tmp_path / "o")


def test_a_checkpoint_is_not_quantized_again(tmp_path):
    zp.save(quantized(weights="int8"), tmp_path / "saved")
    with pytest.raises(SourceError, match="is quantized already; leave weights out"):
        zp.load(tmp_path / "saved", weights="int4")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"quantization_config": zp.ZeropointConfig("int8"), "weights": "int4"},
            RecipeError,
            "give either quantization_config, or weights",
        ),
        (
            {"quantization_config": QuantoConfig(weights="int8"), "load_in_8bit": True},
            RecipeError,
            "give either quantization_config, or load_in_4bit / load_in_8bit",
        ),
        (
            {"weights": "nf4", "load_in_4bit": True},
            RecipeError,
            "weights='nf4' and load_in_4bit / load_in_8bit; give one",
        ),
        ({"load_in_4bit": True, "load_in_8bit": True}, RecipeError, "are both set; choose one"),
        ({"quantization_config": object()}, UnknownNameError, "a object is not understood"),
        ({"weights": "int4", "exclude": ["nothing"]}, UnusedRuleError, "'nothing' matched no"),
        (
            {"weights": "int4", "model": torch.nn.Linear(2, 2)},
            SourceError,
            "model= is for checkpoints that are quantized already",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_contradictions(options, error, message, folder):
    with pytest.raises(error, match=message):
        zp.load(folder, **options)
