"""A candidate that answers with NaN or Inf is an error, not a number."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import zeropoint as zp
from tests.models import build, tokenizer
from zeropoint.errors import NonFiniteError

TEXT = " ".join(f"w{2 + (7 * i + i * i) % 97}" for i in range(64))
PARAGRAPHS = "\n\n".join(TEXT[30 * i : 30 * i + 40] for i in range(5))


def loud(name: str) -> Any:
    """A float32 model whose activations are far beyond float16, though no weight is."""
    model = build(name)
    for key, module in model.named_modules():
        if key.endswith(("mlp.up_proj", "mlp.gate_proj", "intermediate.dense", "output.dense")):
            module.weight.data *= 3e4
    assert max(p.abs().max() for p in model.parameters()) < 65504
    return model


@pytest.mark.parametrize(("name", "text"), [("llama", TEXT), ("t5", TEXT), ("bert", PARAGRAPHS)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("role", ["reference", "candidate"])
def test_answers_that_are_not_finite_are_refused(
    name: str, text: str, value: float, role: str
) -> None:
    good, bad = build(name), build(name)
    for key, parameter in bad.named_parameters():
        if "norm" in key.lower():
            parameter.data[0] = value
    pair = (good, bad) if role == "candidate" else (bad, good)
    what = "hidden states" if name == "bert" else "logits"
    with pytest.raises(
        NonFiniteError,
        match=f"^the {role}'s {what} are NaN or Inf for .* does not fit float32, .*3.40282e.38; "
        "look for the module",
    ):
        zp.compare(*pair, text, tokenizer=tokenizer(), window=16)


@pytest.mark.parametrize(("name", "text"), [("llama", TEXT), ("bert", PARAGRAPHS)])
def test_activations_beyond_float16_are_reported(name: str, text: str) -> None:
    model = loud(name)
    half = copy.deepcopy(model).half()
    assert all(torch.isfinite(p).all() for p in half.parameters()), "weights fit"
    with pytest.raises(
        NonFiniteError, match="does not fit float16, .* is 65504; load it with dtype='bfloat16'"
    ):
        zp.compare(model, half, text, tokenizer=tokenizer(), window=16)
    zp.compare(model, copy.deepcopy(model).bfloat16(), text, tokenizer=tokenizer(), window=16)


def test_the_place_is_named() -> None:
    model = build("llama")
    broken = copy.deepcopy(model)
    last = tokenizer()(TEXT).input_ids[40]
    broken.model.embed_tokens.weight.data[last] = math.nan
    first = tokenizer()(TEXT).input_ids.index(last)
    start = first // 16 * 16
    with pytest.raises(
        NonFiniteError, match=rf"for \d+ of the 15 tokens from {start} on: something"
    ):
        zp.compare(model, broken, TEXT, tokenizer=tokenizer(), window=16)


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    model = build("llama")
    sure = copy.deepcopy(model)
    sure.lm_head.weight.data *= 1e5
    result: Any = zp.compare(model, sure, TEXT, tokenizer=tokenizer())
    assert result.candidate_perplexity == math.inf
    assert math.isfinite(result.delta_nll.mean)
