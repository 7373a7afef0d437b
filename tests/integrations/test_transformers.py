"""zeropoint inside transformers: quantize while loading, save_pretrained, from_pretrained."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import zeropoint as zp
from tests.models import ARCHITECTURES, build, continuation, outputs
from tests.models import tokenizer as word_tokenizer
from zeropoint.errors import CheckpointError, RecipeError, UnknownNameError
from zeropoint.nn import QEmbedding, QModule

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
some = pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5-tied", "bert-masked"])
GENERATES = [n for n in ARCHITECTURES if n not in ("bert", "bert-masked", "vit")]
LOOSE = ("vit", "whisper")  # convolutions are kept, more than a recipe allows by default


@pytest.fixture
def saved(tmp_path, request):
    """A float checkpoint of the architecture."""

    def make(name, **options):
        model = build(name)
        model.save_pretrained(tmp_path / "float", **options)
        return model, tmp_path / "float"

    return make


def config_of(name, weights="int4", **options):
    return zp.ZeropointConfig(weights, strict=name not in LOOSE, **options)


def quantized(model, name, weights="int4"):
    zp.quantize(model, weights, strict=name not in LOOSE)
    zp.freeze(model)
    return model


@every_architecture
def test_loading_quantizes_as_quantize_and_freeze_do(name, saved):
    model, folder = saved(name)
    expected = quantized(model, name)
    loaded = type(model).from_pretrained(folder, quantization_config=config_of(name))
    assert not loaded.training
    assert {n: str(m) for n, m in loaded.named_modules() if isinstance(m, QModule)} == {
        n: str(m) for n, m in expected.named_modules() if isinstance(m, QModule)
    }
    assert torch.equal(outputs(loaded), outputs(expected))
    assert zp.footprint(loaded).to_dict() == zp.footprint(expected).to_dict()
    assert all(p.device.type == "cpu" for p in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("how", ["while loading", "by zp.quantize"])
@every_architecture
def test_a_round_trip_gives_equal_logits_and_a_sound_checkpoint(name, how, saved, tmp_path):
    model, folder = saved(name)
    if how == "while loading":
        model = type(model).from_pretrained(folder, quantization_config=config_of(name))
    else:
        quantized(model, name)
    model.save_pretrained(tmp_path / "quantized")
    assert zp.verify(tmp_path / "quantized") == []
    again = type(model).from_pretrained(tmp_path / "quantized")
    assert torch.equal(outputs(again), outputs(model))
    assert zp.footprint(again).to_dict() == zp.footprint(model).to_dict()
    if name in GENERATES:
        assert torch.equal(continuation(again), continuation(model))
    by_us, _ = zp.load(tmp_path / "quantized")
    assert torch.equal(outputs(by_us), outputs(model))
    # and once more: what was loaded can be saved
    again.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("quantized", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k].view(torch.uint8), second[k].view(torch.uint8)) for k in first)


@some
def test_transformers_reads_what_zp_save_wrote(name, tmp_path):
    model = quantized(build(name), name)
    zp.save(model, tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(loaded), outputs(model))


@some
def test_shards(name, saved, tmp_path):
    model, folder = saved(name, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(folder, quantization_config=config_of(name))
    assert torch.equal(outputs(loaded), outputs(quantized(model, name)))
    loaded.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 1
    assert zp.verify(tmp_path / "quantized") == []
    again = type(model).from_pretrained(tmp_path / "quantized")
    assert torch.equal(outputs(again), outputs(loaded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype(dtype, saved, tmp_path):
    model, folder = saved("llama-tied")
    loaded = type(model).from_pretrained(
        folder, dtype=dtype, quantization_config=config_of("llama", "nf4")
    )
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == dtype
    scales = [p.dtype for n, p in loaded.named_buffers() if n.endswith("weight_scale")]
    assert scales and set(scales) == {torch.float32}
    expected = quantized(type(model).from_pretrained(folder, dtype=dtype), "llama", "nf4")
    assert torch.equal(outputs(loaded), outputs(expected))
    loaded.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert torch.equal(outputs(again), outputs(loaded))


def test_dtype_of_a_checkpoint(saved, tmp_path):
    model, _ = saved("llama-tied")
    quantized(model, "llama").save_pretrained(tmp_path / "q")
    loaded = type(model).from_pretrained(tmp_path / "q", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    by_us, _ = zp.load(tmp_path / "q", dtype=torch.bfloat16)
    assert torch.equal(outputs(loaded), outputs(by_us))


@pytest.mark.parametrize("weights", ["int8", "float8_e4m3fn"])
def test_static_ranges_make_the_round_trip(weights, saved, tmp_path):
    model, _ = saved("llama-tied")
    zp.quantize(model, weights, activations=weights)
    with zp.calibrate(model):
        outputs(model)
    zp.freeze(model)
    model.save_pretrained(tmp_path / "q")
    assert zp.verify(tmp_path / "q") == []
    again = type(model).from_pretrained(tmp_path / "q")
    assert torch.equal(outputs(again), outputs(model))
    assert str(zp.calibration_table(again)) == str(zp.calibration_table(model))


def test_config_json_holds_the_recipe(saved, tmp_path):
    model, folder = saved("llama-tied")
    loaded = type(model).from_pretrained(
        folder, quantization_config=zp.ZeropointConfig("int4", exclude="*.mlp.*")
    )
    loaded.save_pretrained(tmp_path / "quantized")
    data = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert data["quant_method"] == "zeropoint" and data["format_version"] == 1
    recipe = zp.Recipe.from_dict(data["recipe"])
    assert recipe.rules[0] == zp.Rule(match="*.mlp.*")
    assert {r.role for r in recipe.rules[1:]} == {"linear", "embedding", "head"}


@pytest.mark.parametrize("option", ["exclude", "modules_to_not_convert"])
def test_a_skip_list_adds_to_what_is_special_anyway(option, saved):
    model, folder = saved("llama-tied")
    config = zp.ZeropointConfig("int4", **{option: ["*.q_proj"]})
    loaded = type(model).from_pretrained(folder, quantization_config=config)
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, torch.nn.Linear)
    assert str(loaded.lm_head.scheme) == "int8 per channel"


def test_tied_weights_stay_tied(saved):
    model, folder = saved("llama-tied")
    loaded = type(model).from_pretrained(folder, quantization_config=config_of("llama"))
    assert isinstance(loaded.model.embed_tokens, QEmbedding)
    assert loaded.lm_head.tied_to is loaded.model.embed_tokens
    loaded.tie_weights()  # transformers calls it in many places
    assert loaded.lm_head.tied_to is loaded.model.embed_tokens


def test_a_file_with_the_tied_weight_twice(saved):
    model, folder = saved("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = type(model).from_pretrained(folder, quantization_config=config_of("llama"))
    assert torch.equal(outputs(loaded), outputs(quantized(model, "llama")))


def test_dequantize(saved):
    model, folder = saved("llama-tied")
    loaded = type(model).from_pretrained(folder, quantization_config=config_of("llama"))
    expected = outputs(loaded)
    loaded.dequantize()
    assert not [m for m in loaded.modules() if isinstance(m, QModule)]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert (outputs(loaded) - expected).norm() <= 1e-3 * expected.norm()
    assert not hasattr(loaded.config, "quantization_config") and not loaded.is_quantized


def test_a_dequantized_model_is_saved_as_a_float_model(saved, tmp_path):
    model, _ = saved("llama-tied")
    quantized(model, "llama")
    zp.dequantize(model)
    model.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again), outputs(model))
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())


def test_auto_classes_and_pipeline(saved, tmp_path):
    _, folder = saved("llama-tied")
    words = word_tokenizer()
    words.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=zp.ZeropointConfig(weights="int8")
    )
    model.save_pretrained(tmp_path / "quantized")
    words.save_pretrained(tmp_path / "quantized")
    write = transformers.pipeline("text-generation", str(tmp_path / "quantized"))
    assert isinstance(write.model.lm_head, QModule)
    text = write("w3 w4 w5", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("w3 w4 w5")


def test_trainer_evaluates(saved, tmp_path):
    model, folder = saved("llama-tied")
    loaded = type(model).from_pretrained(folder, quantization_config=config_of("llama"))
    rows = [{"input_ids": torch.arange(2, 10), "labels": torch.arange(2, 10)} for _ in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), report_to=[], use_cpu=True, per_device_eval_batch_size=2
    )
    trainer = transformers.Trainer(loaded, arguments, eval_dataset=rows)
    with torch.no_grad():
        loss = loaded(input_ids=torch.arange(2, 10)[None], labels=torch.arange(2, 10)[None]).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_generate_with_a_static_cache_and_compile(saved):
    model, folder = saved("llama")
    loaded = type(model).from_pretrained(folder, quantization_config=config_of("llama"))
    expected = continuation(loaded, 6)
    loaded.generation_config.cache_implementation = "static"
    assert torch.equal(continuation(loaded, 6), expected)
    loaded.forward = torch.compile(loaded.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(continuation(loaded, 6), expected)


def test_assisted_generation_with_a_quantized_draft(saved):
    model, folder = saved("llama")
    draft = type(model).from_pretrained(folder, quantization_config=config_of("llama"))
    ids = torch.arange(2, 10)[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=draft, **options), expected)


def test_a_new_head_is_quantized_too(saved):
    """A classifier from a checkpoint without one: transformers draws it, as it does for floats."""
    _, folder = saved("bert")
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=3)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification.from_pretrained(
        folder, config=config, quantization_config=config_of("bert", "int8")
    )
    weight = model.classifier.weight.dequantize()
    assert weight.shape[0] == 3 and 0.01 < weight.std() < 0.04  # initializer_range is .02
    assert torch.isfinite(outputs(model)).all()


def test_one_config_serves_several_models(saved):
    config = zp.ZeropointConfig("int4")
    for name in ("llama", "gpt2"):
        model, folder = saved(name)
        loaded = type(model).from_pretrained(folder, quantization_config=config)
        assert torch.equal(outputs(loaded), outputs(quantized(model, name)))
    assert config.recipe is None


# --- what goes wrong ---


def test_a_weight_that_cannot_be_stored_is_named(saved):
    model, folder = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(zp.ZeropointError, match=r"layers.1.mlp.up_proj.weight: 1 NaN and 0 Inf"):
        zp.load(folder, weights="int4")
    with pytest.raises(RuntimeError):
        type(model).from_pretrained(folder, quantization_config=config_of("llama"))


def test_a_group_size_that_does_not_divide_is_refused_before_anything_is_read(saved):
    model, folder = saved("llama")
    config = zp.ZeropointConfig("int4", group_size=48)
    with pytest.raises(zp.ZeropointError, match=r"K=64 is not a multiple of group_size=48"):
        type(model).from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": "int9"}, UnknownNameError, "'int9' is not a format; close: 'int8'"),
        ({"weights": "int4", "algorithm": "gptq"}, RecipeError, "'gptq' needs calibration data"),
        ({"algorithm": "best"}, UnknownNameError, "'best' is not an algorithm"),
        (
            {"exclude": "a", "modules_to_not_convert": "b"},
            RecipeError,
            "exclude and modules_to_not_convert are one thing",
        ),
        ({"quant_method": "gptq"}, RecipeError, "quant_method='gptq' is not 'zeropoint'"),
        ({"format_version": 99}, CheckpointError, "newer zeropoint .format 99, this one reads up"),
    ],
)
def test_a_config_that_makes_no_sense(arguments, error, message):
    with pytest.raises(error, match=message):
        zp.ZeropointConfig(**arguments)


def test_a_checkpoint_whose_header_is_gone(saved, tmp_path):
    model, _ = saved("llama")
    quantized(model, "llama").save_pretrained(tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    for load in (type(model).from_pretrained, zp.load):
        with pytest.raises(CheckpointError, match="has no 'zeropoint' in the header"):
            load(tmp_path / "q")
    assert "has no 'zeropoint' in the header" in zp.verify(tmp_path / "q")[0]


def test_verify_finds_a_flipped_bit_in_what_transformers_wrote(saved, tmp_path):
    model, _ = saved("llama")
    quantized(model, "llama").save_pretrained(tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    assert any("another SHA-256 than when written" in p for p in zp.verify(tmp_path / "q"))
    with pytest.raises(CheckpointError, match="another SHA-256"):
        zp.load(tmp_path / "q")


def test_shards_of_two_checkpoints_do_not_mix(saved, tmp_path):
    model, _ = saved("llama")
    quantized(model, "llama").save_pretrained(tmp_path / "q", max_shard_size="20KB")
    other = quantized(build("llama", seed=1), "llama")
    other.save_pretrained(tmp_path / "other", max_shard_size="20KB")
    name = sorted(p.name for p in (tmp_path / "q").glob("*.safetensors"))[1]
    (tmp_path / "q" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(CheckpointError, match="shards of different checkpoints"):
        zp.load(tmp_path / "q")
