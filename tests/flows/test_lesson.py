"""The byte counts of published models: sizes from their configurations, weights at random."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

import zeropoint as zp
from zeropoint.qtensor import QTensor


def fill(model):
    """One block of normal numbers, over and over: good enough for counting, and quick."""
    block = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                piece = flat[start : start + block.numel()]
                piece.copy_(block[: piece.numel()])
    return model.eval()


@pytest.fixture
def flan_t5_small():
    config = transformers.T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_decoder_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
    )
    with no_init_weights():
        model = transformers.T5ForConditionalGeneration(config)
    model.tie_weights()
    # As published, the head has its own weight; transformers 5 ties it all the same.
    model.lm_head.weight = nn.Parameter(torch.empty(32128, 512))
    return fill(model)


@pytest.fixture
def pythia_410m():
    config = transformers.GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        rotary_pct=0.25,
        tie_word_embeddings=False,
    )
    with no_init_weights():
        model = transformers.GPTNeoXForCausalLM(config)
    return fill(model)


def test_flan_t5_small_with_its_embeddings_kept(flan_t5_small):
    before = zp.footprint(flan_t5_small)
    assert before.total_bytes == before.parameter_bytes == 307_844_608
    assert before.parameters == 76_961_152 and before.by_dtype == {"float32": 307_844_608}
    report = zp.quantize(flan_t5_small, "int8", exclude=["shared", "*embed_tokens*"])
    zp.freeze(flan_t5_small)
    assert zp.footprint(flan_t5_small).total_bytes == report.bytes_after <= 126_828_680
    shared = flan_t5_small.shared.weight
    assert shared is flan_t5_small.encoder.embed_tokens.weight and shared.dtype == torch.float32


def test_flan_t5_small_with_the_default_recipe(flan_t5_small):
    report = zp.quantize(flan_t5_small, "int8")
    assert report.bytes_before == 307_844_608 and report.coverage == 1.0
    zp.freeze(flan_t5_small)
    after = zp.footprint(flan_t5_small)
    assert after.total_bytes == report.bytes_after < 80_000_000
    assert after.parameters == 76_961_152, "quantized numbers still count"
    assert after.by_dtype.keys() == {"uint8", "float32"}


def test_pythia_410m(pythia_410m):
    """Two recipes on one model; only the second is frozen, to save time."""
    model = pythia_410m
    before = zp.footprint(model)
    assert before.parameters == 405_334_016
    assert before.parameter_bytes == 1_621_336_064
    kept = zp.quantize(model, "int8", exclude="*embed_in")
    assert kept.bytes_after <= 580_794_472
    assert [m.name for m in kept.kept] == ["gpt_neox.embed_in"]
    zp.dequantize(model)

    report = zp.quantize(model, "int8")
    dense = "gpt_neox.layers.0.attention.dense"
    live = model.get_submodule(dense).weight
    assert isinstance(live, nn.Parameter)
    assert "Parameter containing" in str(live) and "0.0" in str(live)
    zp.freeze(model)
    after = zp.footprint(model)
    assert after.total_bytes == report.bytes_after < 425_000_000
    assert after.parameters == 405_334_016

    weight = model.get_submodule(dense).weight
    assert isinstance(weight, QTensor)
    assert weight.codes.dtype == torch.int8 and weight.codes.shape == (1024, 1024)
    assert weight.scale.shape == (1024, 1), "one scale per row"
    assert str(weight).startswith("QTensor(int8 per channel, shape=(1024, 1024)")
    assert "dtype=torch.int8" in str(weight) and "scale=tensor([[" in str(weight)
    line = (
        "(dense): QLinear(in_features=1024, out_features=1024, bias=True, int8 per channel, frozen"
    )
    assert line in repr(model)
    assert "(embed_in): QEmbedding(50304, 1024, int8 per channel, frozen" in repr(model)
    assert "(final_layer_norm): LayerNorm" in repr(model)
