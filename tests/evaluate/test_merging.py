"""Merging adapters and measuring what it cost."""

from __future__ import annotations

import peft
import pytest
import torch

import zeropoint as zp
from tests.models import VOCABULARY, build, outputs
from tests.models import tokenizer as word_tokenizer
from zeropoint.errors import NonFiniteError, SourceError, StateError, TextError
from zeropoint.evaluate import merging

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TEXT = " ".join(f"w{2 + 7 * i % (VOCABULARY - 2)}" for i in range(60))


def adapted(name="llama", weights="int4", std=0.1, targets="all-linear"):
    """A quantized model with an adapter whose B is noise."""
    model = build(name)
    zp.quantize(model, weights)
    zp.freeze(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return wrapped


def kl(reference, candidate):
    """Mean over all but the last of the tokens, as the report counts."""
    p, q = (x[0, :-1].double().log_softmax(-1) for x in (reference, candidate))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@torch.no_grad()
def test_the_report_is_what_the_models_answer():
    model, tokenizer = adapted(), word_tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, 30:]  # the half that measures
    with_adapter = logits(model, ids)
    with model.disable_adapter():
        base = logits(model, ids)
    weights = {n: m.get_base_layer().qweight.dequantize() for n, m in layers(model).items()}
    model.train()
    report = zp.merge_adapter(model, TEXT, tokenizer=tokenizer)
    assert model.training
    model.eval()
    merged = logits(model, ids)
    assert report.adapters == ("default",) and report.tokens == 29
    assert report.adapter_kl == pytest.approx(kl(with_adapter, base), rel=1e-4)
    assert report.merge_kl == pytest.approx(kl(with_adapter, merged), rel=1e-4)
    assert 0 < report.merge_kl < report.adapter_kl
    for row in report.layers:
        layer, weight = layers(model)[row.name], weights[row.name]
        delta = layer.get_delta_weight("default").detach()
        error = weight + delta - layer.get_base_layer().qweight.dequantize()
        assert row.change == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
        assert row.error == pytest.approx(float(error.norm() / (weight + delta).norm()), rel=1e-4)
    assert "default merged into 14 layers; largest error " in str(report)
    assert f"29 tokens: KL of the adapter to the base {report.adapter_kl:.4f}, to" in str(report)
    plain = model.unload()
    assert torch.equal(logits(plain, ids), merged)


def layers(model):
    """Those with an adapter on codes."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "merged_error")}


def test_without_a_text_only_weights_are_compared():
    model = adapted(targets=["q_proj"])
    before = outputs(model)
    report = zp.merge_adapter(model)
    assert len(report.layers) == 2 and report.tokens == 0
    assert report.adapter_kl is None and report.merge_kl is None and "\n" not in str(report)
    model.unmerge_adapter()
    assert torch.equal(outputs(model), before)


def test_pieces_windows_and_the_number_of_tokens():
    words = TEXT.split()
    pieces = [" ".join(words[:20]), words[0], " ".join(words[20:50])]
    report = zp.merge_adapter(adapted(), pieces, tokenizer=word_tokenizer(), tokens=40, window=8)
    # 20 tokens: 8 8 4; 1: none; 19: 8 8 3; every second one measures
    assert report.tokens == 7 + 7 + 2


def test_a_text_makes_the_merge_better():
    """The change is small, so that codes that know no inputs lose much of it."""
    lost = []
    text = " ".join(TEXT.split() * 8)
    for way in (None, text):
        model, tokenizer = adapted(std=0.02), word_tokenizer()
        ids = tokenizer(text, return_tensors="pt").input_ids[:, 256:]
        wanted = logits(model, ids)
        zp.merge_adapter(model, way, tokenizer=tokenizer)
        lost.append(kl(wanted, logits(model, ids)))
    assert lost[1] < 0.5 * lost[0]


def test_layers_take_turns_when_their_moments_do_not_fit(monkeypatch):
    whole = zp.merge_adapter(adapted(), TEXT, tokenizer=word_tokenizer())
    monkeypatch.setattr(merging, "MOMENT_BYTES", 3 * 4 * 64**2)
    model = adapted()
    seen = []
    parts = zp.merge_adapter(
        model, TEXT, tokenizer=word_tokenizer(), on_step=lambda what, *_: seen.append(what)
    )
    assert len(parts.layers) == len(whole.layers) == 14
    assert [layer.error for layer in parts.layers] != [layer.error for layer in whole.layers]
    assert parts.merge_kl < 2 * whole.merge_kl
    assert {"merging", "comparing"} == set(seen)


def test_adapters_on_float_layers_are_merged_too():
    model = build("llama")
    zp.quantize(model, "int4", exclude="*.mlp.*")
    zp.freeze(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    report = zp.merge_adapter(wrapped)
    assert len(report.layers) == 8
    assert wrapped.get_model_status().merged_adapters == ["default"]
    assert not [m for m in wrapped.unload().modules() if hasattr(m, "lora_A")]


def test_an_encoder_decoder():
    report = zp.merge_adapter(adapted("t5-tied"), TEXT, tokenizer=word_tokenizer())
    assert report.merge_kl < report.adapter_kl


def test_errors_leave_the_model_unmerged():
    plain = build("llama")
    zp.quantize(plain, "int4")
    with pytest.raises(StateError, match="no quantized layer has an adapter; quantize, freeze"):
        zp.merge_adapter(plain)
    model, tokenizer = adapted(), word_tokenizer()
    before = outputs(model)
    with pytest.raises(SourceError, match="the text needs a tokenizer; pass tokenizer="):
        zp.merge_adapter(model, TEXT)
    with pytest.raises(TextError, match=r"no two windows of 2 tokens \(tokens=4096, win"):
        zp.merge_adapter(model, "w5", tokenizer=tokenizer)
    with pytest.raises(SourceError, match="is not a language model and gives no logits"):
        zp.merge_adapter(adapted("bert"), TEXT, tokenizer=tokenizer)
    norm = model.get_base_model().model.norm.weight
    with torch.no_grad():
        norm[0] = torch.nan
    with pytest.raises(NonFiniteError, match="the adapter's logits are NaN"):
        zp.merge_adapter(model, TEXT, tokenizer=tokenizer)
    assert not any(m._moment is not None for m in layers(model).values())
    assert not any(m.merged for m in layers(model).values())
    with torch.no_grad():
        norm[0] = 1.0
    assert outputs(model).shape == before.shape
    zp.merge_adapter(model)
    with pytest.raises(StateError, match=r"q_proj is merged already; call model.unmerge_adapter"):
        zp.merge_adapter(model)
