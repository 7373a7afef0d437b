"""Tiny models of many families through quantize, freeze, generate, save and load."""

from __future__ import annotations

import copy

import pytest
import torch

import zeropoint as zp
from tests.models import ARCHITECTURES, build, continuation, example_inputs, outputs
from zeropoint.nn import QModule

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
TYPICAL = pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5-tied", "vit"])
GENERATES = [n for n in ARCHITECTURES if n not in ("bert", "bert-masked", "vit")]


def ties(model):
    """Groups of names that share one weight."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QModule):
            groups.setdefault(id(module.tied_to or module), []).append(name)
        elif isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            groups.setdefault(id(module.weight), []).append(name)
    return sorted(g for g in groups.values() if len(g) > 1)


@pytest.mark.usefixtures("torch_kernel")
@pytest.mark.parametrize("weights", ["int8", "int4"])
@every_architecture
def test_a_model_survives_the_whole_way_bit_by_bit(name, weights, tmp_path):
    model = build(name)
    shared, reference = ties(model), outputs(model)
    report = zp.quantize(model, weights, strict=name not in ("vit", "whisper"))
    live = outputs(model)
    zp.freeze(model)
    frozen = outputs(model)
    assert torch.equal(frozen, live)
    # Rounding errors are independent: outputs are off by about as much as each weight is.
    error = (frozen - reference).norm() / reference.norm()
    assert 0 < error < {"int8": 0.03, "int4": 0.5}[weights]
    assert zp.footprint(model).total_bytes == report.bytes_after < report.bytes_before
    assert ties(model) == shared

    zp.save(model, tmp_path / "saved")
    assert zp.verify(tmp_path / "saved") == []
    loaded, tokenizer = zp.load(tmp_path / "saved")
    assert tokenizer is None and type(loaded) is type(model)
    assert torch.equal(outputs(loaded), frozen)
    assert zp.footprint(loaded).to_dict() == zp.footprint(model).to_dict()
    assert ties(loaded) == shared
    if name in GENERATES:
        assert torch.equal(continuation(loaded), continuation(model))


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4"])
@TYPICAL
def test_native_kernels_answer_as_torch_does(name, weights, tmp_path, monkeypatch):
    model = build(name)
    zp.quantize(model, weights, strict=False)
    monkeypatch.setenv("ZEROPOINT_KERNEL", "torch")
    zp.freeze(model)
    expected = outputs(model)
    zp.save(model, tmp_path / "saved")
    monkeypatch.setenv("ZEROPOINT_KERNEL", "native")
    loaded, _ = zp.load(tmp_path / "saved")
    found = outputs(loaded)
    # 16-bit activations are within 2^-16 of a block's largest at each of a few layers.
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    again, _ = zp.load(tmp_path / "saved")
    assert torch.equal(outputs(again), found)


@TYPICAL
def test_casting_to_bfloat16_keeps_every_code_and_scale(name):
    model = build(name)
    zp.quantize(model, "int4", strict=False)
    zp.freeze(model)
    before = {n: {s: p.clone() for s, p in m.qweight.parts.items()} for n, m in frozen(model)}
    model.to(torch.bfloat16)
    for module_name, module in frozen(model):
        assert module.weight.dtype == torch.bfloat16
        for suffix, part in module.qweight.parts.items():
            assert part.dtype == before[module_name][suffix].dtype
            assert torch.equal(part, before[module_name][suffix])
    inputs = {
        k: v.to(torch.bfloat16) if v.is_floating_point() else v
        for k, v in example_inputs(model).items()
    }
    assert model(**inputs)[0].dtype == torch.bfloat16


def frozen(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, QModule)]


@TYPICAL
def test_a_deep_copy_is_equal_independent_and_tied_alike(name):
    model = build(name)
    zp.quantize(model, "int4", strict=False)
    zp.freeze(model)
    copied = copy.deepcopy(model)
    expected = outputs(model)
    assert ties(copied) == ties(model) and torch.equal(outputs(copied), expected)
    for _, module in frozen(copied):
        module.qweight.packed.zero_()
    assert torch.equal(outputs(model), expected) and not torch.equal(outputs(copied), expected)


@TYPICAL
def test_a_pickled_state_dict_loads_into_another_frozen_model(name, tmp_path):
    source, target = build(name, seed=1), build(name, seed=2)
    for model in (source, target):
        zp.quantize(model, "int4", strict=False)
        zp.freeze(model)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert not torch.equal(outputs(source), outputs(target))
    target.load_state_dict(state, strict=True)
    assert torch.equal(outputs(source), outputs(target))
