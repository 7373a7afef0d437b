"""The report of a quantization: every module once, as data and as text."""

from __future__ import annotations

import json

import pytest

import zeropoint as zp
from tests.models import build, perceptron


@pytest.mark.usefixtures("torch_kernel")
def test_the_dictionary_has_the_documented_keys_and_is_json():
    report = zp.quantize(perceptron(), "int4", exclude="up")
    data = json.loads(json.dumps(report.to_dict()))
    assert data.keys() == {
        "modules",
        "bytes_before",
        "bytes_after",
        "bits_per_weight",
        "coverage",
        "recipe",
        "warnings",
        "budget_bytes",
        "predicted_kl",
        "measured_kl",
        "predicted_error",
        "measured_error",
        "calibration",
    }
    keys = "name action scheme kernel reason elements bytes_before bytes_after".split()
    assert all(list(row) == keys for row in data["modules"])
    assert data["modules"][1] == {
        "name": "up",
        "action": "kept",
        "scheme": None,
        "kernel": None,
        "reason": "rule 'up' keeps it",
        "elements": 8192,
        "bytes_before": 32768,
        "bytes_after": 32768,
    }
    assert data["modules"][2] == {
        "name": "down",
        "action": "quantized",
        "scheme": "int4 g32 asymmetric",
        "kernel": "torch",
        "reason": None,
        "elements": 8192,
        "bytes_before": 32768,
        "bytes_after": 8192 // 2 + 8192 // 32 * 3,
    }
    assert zp.Recipe.from_dict(data["recipe"]) == report.recipe
    assert data["warnings"] == []
    assert {v for k, v in data.items() if k.startswith(("budget", "predicted", "measured"))} == {
        None
    }, "there was no budget"


def test_bytes_and_bits_are_those_of_the_frozen_model():
    model = build("llama-tied")
    before = zp.footprint(model)
    report = zp.quantize(model, "int4")
    zp.freeze(model)
    after = zp.footprint(model)
    assert report.bytes_before == before.total_bytes
    assert report.bytes_after == after.total_bytes
    assert report.bits_per_weight == 8 * report.bytes_after / before.parameters
    weights = sum(m.bytes_after for m in report.modules)
    assert report.bytes_after - weights == report.bytes_before - sum(
        m.bytes_before for m in report.modules
    )


def test_the_text_says_what_happened_in_a_line_for_each_kind():
    report = zp.quantize(perceptron(), "int4", exclude=["up", "u?", "dwon"], strict=False)
    lines = str(report).splitlines()
    assert lines[0].startswith("0.1 MB -> ") and "bits per weight" in lines[0]
    assert "51.1% of weight matrices quantized" not in lines[0]
    assert lines[1].startswith("  int8 per channel: embed, 0.00 -> 0.00 MB")
    assert "  kept: up, 0.03 -> 0.03 MB; rule 'up' keeps it" in lines
    assert "  int8 per channel: head, 0.00 -> 0.00 MB; tied to embed" in lines
    assert [x for x in lines if x.startswith("  warning: ")] == [
        "  warning: rule 'u?' decides nothing: of 'up' and others, an earlier rule takes them all",
        "  warning: rule 'dwon' matched no module; close: 'down'",
    ]


def test_alike_modules_share_a_line():
    text = str(zp.quantize(build("llama"), "int4"))
    assert "int4 g32 asymmetric: model.layers.0.self_attn.q_proj ... (14 modules)" in text
