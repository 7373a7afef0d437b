"""Calibration data: what a user may give, and what is refused."""

from __future__ import annotations

import pytest
import torch

import zeropoint as zp
from tests.models import build, example_inputs, perceptron, tokenizer
from zeropoint.errors import RecipeError, TextError
from zeropoint.flows.data import Calibration, prepare

TEXT = " ".join(f"w{2 + i % 90}" for i in range(300))
SMALL = Calibration(tokens=64, window=16, batch_tokens=32)


def ready(data, name="llama", options=SMALL, words=None):
    return prepare(build(name), data, words, options)


def test_texts_become_windows_drawn_by_the_seed():
    found = ready([TEXT], words=tokenizer())
    assert [b["input_ids"].shape for b in found.batches] == [(2, 16), (2, 16)]
    assert (found.tokens, found.source, found.warnings) == (64, "texts", ())
    again = ready([TEXT], words=tokenizer())
    other = ready([TEXT], options=Calibration(tokens=64, window=16, seed=1), words=tokenizer())
    assert torch.equal(found.batches[0]["input_ids"], again.batches[0]["input_ids"])
    assert not torch.equal(found.batches[0]["input_ids"], other.batches[0]["input_ids"][:2])


def test_one_string_is_one_text():
    assert ready(TEXT, words=tokenizer()).tokens == 64


def test_token_ids_need_no_tokenizer():
    ids = torch.arange(2, 90)
    assert ready(ids).tokens == 64
    assert ready([ids[:20], ids[20:40]]).tokens == 32
    assert ready(ids[:80].view(4, 20)).tokens == 64


def test_text_shorter_than_a_window_is_one_short_window():
    found = ready(["w5 w6 w7 w8 w9"], words=tokenizer())
    assert found.batches[0]["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert found.warnings == (
        "only 5 calibration tokens, less than one window of 16: the codes fit this text more than "
        "the model",
    )


def test_windows_fit_the_models_context():
    found = ready([TEXT], options=Calibration(tokens=512), words=tokenizer())
    assert found.batches[0]["input_ids"].shape == (4, 64), "the context is 64 tokens"


def test_encoders_read_paragraphs_padded_together():
    text = "w5 w6 w7 w8\n\nw9 w10\n\nw9 w10"
    found = ready([text], name="bert", words=tokenizer())
    (batch,) = found.batches
    assert batch["attention_mask"].sum() == found.tokens == 6
    assert batch["input_ids"].shape == (2, 4)


def test_encoder_decoders_read_one_half_and_write_the_other():
    found = ready([TEXT], name="t5", words=tokenizer())
    assert {k: tuple(v.shape) for k, v in found.batches[0].items()} == {
        "input_ids": (2, 8),
        "decoder_input_ids": (2, 8),
    }


def test_batches_are_used_as_they_are():
    inputs = example_inputs(build("vit"))
    found = ready([inputs, inputs], name="vit")
    assert len(found.batches) == 2 and found.source == "batches"
    assert torch.equal(found.batches[0]["pixel_values"], inputs["pixel_values"])


def test_inputs_of_a_model_of_ones_own_are_positional():
    found = prepare(perceptron(), [torch.tensor([1, 2, 3]), torch.tensor([5])], None, SMALL)
    assert [b.tolist() for b in found.batches] == [[1, 2, 3], [5]]
    alone = prepare(perceptron(), torch.tensor([1, 2, 3]), None, SMALL)
    assert [b.tolist() for b in alone.batches] == [[1, 2, 3]]
    floats = prepare(perceptron(), [torch.randn(2, 3)], None, SMALL)
    assert floats.batches[0].shape == (2, 3)


def test_a_model_writes_its_own_text_the_same_for_a_seed():
    one, two, other = (
        ready("self", options=Calibration(tokens=64, window=16, seed=seed)) for seed in (0, 0, 1)
    )
    assert one.source == "text the model wrote itself" and one.tokens == 64
    assert torch.equal(one.batches[0]["input_ids"], two.batches[0]["input_ids"])
    assert not torch.equal(one.batches[0]["input_ids"], other.batches[0]["input_ids"])


def test_writing_leaves_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    ready(None)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_a_model_that_does_not_write_asks_for_data(name):
    with pytest.raises(
        TextError, match=r"cannot write its own calibration text; give data=\[texts"
    ):
        ready("self", name=name)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([TEXT], "calibration texts need a tokenizer; pass tokenizer=, or token ids"),
        ([], "the calibration data is empty; give texts, token ids or batches"),
        ([3], "calibration data of int is not understood; give strings"),
        (["w5", torch.ones(2)], "calibration data of Tensor, str is not understood"),
        (torch.tensor([2, 3]), "the calibration data has 2 tokens; calibrating needs at least 4"),
    ],
)
def test_unusable_data_is_refused(data, message):
    with pytest.raises(TextError, match=message):
        ready(data)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_empty_texts_are_refused(name):
    with pytest.raises(TextError, match="0 tokens; calibrating needs at least 4"):
        ready([" ", "\n"], name=name, words=tokenizer())


@pytest.mark.parametrize("field", ["tokens", "window", "batch_tokens"])
def test_options_out_of_range_are_refused(field):
    with pytest.raises(RecipeError, match=f"{field}=3: use at least 4"):
        Calibration(**{field: 3})
    with pytest.raises(RecipeError, match="propagate=1.5 is not a share between 0 and 1"):
        Calibration(propagate=1.5)


@pytest.mark.parametrize("arguments", [{"data": [TEXT]}, {"calibration": SMALL}])
def test_data_for_an_algorithm_that_uses_none_is_refused(arguments):
    model = build("llama")
    zp.quantize(model)
    with pytest.raises(
        RecipeError, match="'rtn' uses no calibration data; leave data, effort and calibration out,"
    ):
        zp.freeze(model, **arguments)
