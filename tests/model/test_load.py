"""From a source to a model: the class, the dtype, the memory, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

import zeropoint as zp
from tests.models import (
    PERCEPTRON_INPUT,
    build,
    example_inputs,
    llama,
    outputs,
    perceptron,
    tokenizer,
)
from zeropoint.errors import CheckpointError, SourceError, UnknownNameError
from zeropoint.model import load as load_module


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """Folders of float checkpoints, as transformers writes them."""
    root = tmp_path_factory.mktemp("floats")
    for name in ("llama", "bert", "bert-masked", "t5", "vit"):
        build(name).save_pretrained(root / name)
    tokenizer().save_pretrained(root / "llama")
    return root


@pytest.fixture
def frozen(tmp_path):
    """(model, folder) of a frozen Llama with a tokenizer."""
    model = build("llama-tied")
    zp.quantize(model, "int4")
    zp.freeze(model)
    zp.save(model, tmp_path / "frozen", tokenizer=tokenizer())
    return model, tmp_path / "frozen"


@pytest.fixture
def plain(tmp_path):
    """(model, folder) of a frozen module that is not a transformers model."""
    model = perceptron()
    zp.quantize(model, "int4")
    zp.freeze(model)
    zp.save(model, tmp_path / "plain")
    return model, tmp_path / "plain"


# --- float checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "bert-masked", "t5", "vit"])
def test_the_configuration_names_the_class(floats, name):
    model, words = zp.load(floats / name)
    expected = build(name)
    assert type(model) is type(expected) and not model.training
    assert torch.equal(outputs(model), outputs(expected))
    assert (words is not None) == (name == "llama")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", transformers.LlamaForCausalLM),
        ("bert", transformers.BertModel),
        ("t5", transformers.T5ForConditionalGeneration),
        ("vit", transformers.ViTModel),
    ],
)
def test_without_a_class_the_configuration_decides(floats, tmp_path, name, kind):
    source, target = floats / name, tmp_path / name
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    del config["architectures"]
    (target / "config.json").write_text(json.dumps(config))
    if name == "vit":  # ViTModel has a pooler that the classifier has not; transformers says so
        assert type(zp.load(target)[0]).__name__ == "ViTModel"
    else:
        assert type(zp.load(target)[0]) is kind


def test_a_task_chooses_the_class(floats):
    model, _ = zp.load(floats / "llama", task="feature-extraction")
    assert type(model) is transformers.LlamaModel


def test_an_unknown_task_is_refused_with_the_nearest(floats):
    with pytest.raises(UnknownNameError, match="'text-genration' is not a task; .*generation"):
        zp.load(floats / "llama", task="text-genration")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16"])
def test_a_dtype_is_a_name_or_torchs_own(floats, dtype):
    model, _ = zp.load(floats / "llama", dtype=dtype)
    expected = torch.float16 if dtype == "float16" else torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {expected}


@pytest.mark.parametrize("dtype", ["float31", "int8", torch.int8, "float8_e4m3fn", "nn", 16, None])
def test_a_dtype_that_is_no_float_is_refused(floats, dtype):
    with pytest.raises(UnknownNameError, match="dtype=.* is not one of auto, float32, bfloat16"):
        zp.load(floats / "llama", dtype=dtype)


def test_a_damaged_float_checkpoint_is_refused(floats, tmp_path):
    (tmp_path / "config.json").write_bytes((floats / "llama" / "config.json").read_bytes())
    with pytest.raises(SourceError, match="cannot be loaded: .*no file named model.safetensors"):
        zp.load(tmp_path)
    data = (floats / "llama" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="cannot be loaded: "):
        zp.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match="cannot be loaded: .*config.json"):
        zp.load(tmp_path)


def test_a_damaged_tokenizer_is_refused(floats, tmp_path):
    for file in (floats / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(SourceError, match=f"the tokenizer of '{tmp_path}' cannot be loaded"):
        zp.load(tmp_path)


def test_a_model_argument_is_for_zeropoint_checkpoints(floats):
    with pytest.raises(SourceError, match="model= is for zeropoint checkpoints"):
        zp.load(floats / "llama", model=llama())


def test_a_hub_model_that_cannot_be_reached_is_refused(monkeypatch):
    def offline(*args, **options):
        raise OSError("we are offline")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(SourceError, match="'owner/name' cannot be loaded: we are offline"):
        zp.load("owner/name")


def test_a_hub_model_may_have_no_tokenizer(floats, monkeypatch):
    """Vision models have none; their load does not fail for it."""
    found = transformers.AutoConfig.from_pretrained(floats / "vit")
    model = build("vit")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *a, **k: found)
    monkeypatch.setattr(
        transformers.ViTForImageClassification, "from_pretrained", lambda *a, **k: model
    )

    def missing(*args, **options):
        raise OSError("no tokenizer")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", missing)
    assert zp.load("owner/name") == (model, None)


def test_a_quantized_file_of_another_library_becomes_a_plain_float_model(tmp_path):
    """GGUF: transformers dequantizes it; nothing marks the result as quantized."""
    gguf = pytest.importorskip("gguf")
    import numpy

    model = build("llama")
    config = model.config
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    layer = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{a}.weight": f"blk.{i}.{b}.weight" for a, b in layer.items()}
    state = model.state_dict()
    for name, target in names.items():
        writer.add_tensor(target, state[name].numpy().astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    loaded, _ = zp.load(tmp_path / "tiny.gguf")
    assert type(loaded) is transformers.LlamaForCausalLM and not loaded.training
    assert not hasattr(loaded.config, "quantization_config")
    weight = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(loaded.get_parameter(weight), state[weight])
    loaded.save_pretrained(tmp_path / "plain")
    again, _ = zp.load(tmp_path / "plain")
    assert torch.equal(outputs(again), outputs(loaded))


# --- zeropoint checkpoints ------------------------------------------------------------------------


def test_a_frozen_model_comes_back_with_its_tokenizer_and_settings(frozen):
    model, path = frozen
    loaded, words = zp.load(path)
    assert torch.equal(outputs(loaded), outputs(model)) and not loaded.training
    assert words("w5 w17")["input_ids"] == [5, 17]
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    recipe = loaded.config.quantization_config.recipe  # for transformers, too
    assert recipe == model.config.quantization_config.recipe


def test_the_skeleton_has_no_memory(frozen, monkeypatch):
    """Peak memory is the quantized size: the float model exists on the meta device only."""
    _, path = frozen
    seen = []
    fill = load_module._fill

    def watched(path, skeleton, contents):
        seen.append({n: p.device.type for n, p in skeleton.named_parameters()})
        fill(path, skeleton, contents)

    monkeypatch.setattr(load_module, "_fill", watched)
    loaded, _ = zp.load(path)
    assert set(seen[0].values()) == {"meta"} and "model.norm.weight" in seen[0]
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


def test_loading_again_gives_tensors_of_its_own(frozen):
    _, path = frozen
    first, second = zp.load(path)[0], zp.load(path)[0]
    expected = outputs(second)
    first.model.embed_tokens.weight.packed.zero_()
    with torch.no_grad():
        first.model.norm.weight.zero_()
    assert torch.equal(outputs(second), expected)
    assert torch.equal(outputs(zp.load(path)[0]), expected), "nothing is written to the files"


def test_a_dtype_changes_what_weights_dequantize_to(frozen):
    model, path = frozen
    loaded, _ = zp.load(path, dtype="bfloat16")
    layer, original = loaded.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.scale.dtype == torch.float16
    assert torch.equal(layer.weight.codes, original.weight.codes)
    assert loaded(**example_inputs(loaded)).logits.dtype == torch.bfloat16


def test_a_dtype_leaves_rotary_frequencies_as_transformers_does(frozen, floats):
    """In bfloat16 they would be off by up to 0.4 %, and positions far apart by many turns."""
    _, path = frozen
    reference, _ = zp.load(floats / "llama", dtype="bfloat16")
    loaded, _ = zp.load(path, dtype="bfloat16")
    assert reference.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(loaded.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_a_device_is_one_device(frozen, device):
    model, path = frozen
    assert torch.equal(outputs(zp.load(path, device_map=device)[0]), outputs(model))


def test_a_task_that_the_checkpoint_is_not_for_is_refused(frozen):
    message = "holds a quantized model.embed_tokens, which is not in the model; is this the right"
    with pytest.raises(CheckpointError, match=message):
        zp.load(frozen[1], task="feature-extraction")


# --- zeropoint checkpoints of other modules -------------------------------------------------------


def test_a_plain_module_is_filled_in_place(plain):
    model, path = plain
    target = perceptron(seed=5)
    loaded, words = zp.load(path, model=target)
    assert loaded is target and words is None
    assert torch.equal(loaded(PERCEPTRON_INPUT), model(PERCEPTRON_INPUT))
    assert loaded.head.tied_to is loaded.embed
    assert torch.equal(loaded.norm.running_mean, model.norm.running_mean)


def test_a_plain_module_may_be_filled_from_the_meta_device(plain):
    model, path = plain
    with torch.device("meta"):
        from tests.models import Perceptron

        target = Perceptron()
    loaded, _ = zp.load(path, model=target)
    assert torch.equal(loaded(PERCEPTRON_INPUT), model(PERCEPTRON_INPUT))


def test_a_plain_module_needs_a_model_to_fill(plain):
    message = "not a transformers model; pass model= with a float module of its structure"
    with pytest.raises(SourceError, match=message):
        zp.load(plain[1])


def wrong_names():
    return nn.Sequential(nn.Linear(64, 128))


def wrong_type():
    model = perceptron()
    model.up = nn.Identity()
    return model


def wrong_width():
    return perceptron(width=32)


def one_more():
    model = perceptron()
    model.more = nn.LayerNorm(3)
    return model


def one_less():
    model = perceptron()
    model.norm = nn.Identity()
    return model


def other_bias():
    model = perceptron()
    model.norm.bias = nn.Parameter(torch.zeros(5))
    return model


def other_buffer():
    model = perceptron()
    model.norm.running_mean = torch.zeros(5)
    return model


def without_bias():
    model = perceptron()
    model.up = nn.Linear(64, 128, bias=False)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (wrong_names, "quantized embed, which is not in the model; is this the right model"),
        (wrong_type, "quantized up, which is a Identity; is this the right model"),
        (wrong_width, r"embed.weight is \(11, 64\), but the model has \(11, 32\)"),
        (one_more, "lacks more.weight, which the model has"),
        (one_less, "holds norm.bias, which the model does not have"),
        (other_bias, r"norm.bias is \(128,\), but the model has \(5,\)"),
        (other_buffer, r"norm.running_mean is \(128,\), but the model has \(5,\)"),
        (without_bias, "holds up.bias, which the model does not have"),
    ],
)
def test_a_model_of_another_structure_is_refused(plain, model, message):
    with pytest.raises(CheckpointError, match=message):
        zp.load(plain[1], model=model())
