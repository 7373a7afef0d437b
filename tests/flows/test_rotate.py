"""A rotated model answers as before, is a model of its class, and is never half rotated."""

import copy

import pytest
import torch
from torch import nn

import zeropoint as zp
from tests.models import ARCHITECTURES, build, example_inputs, outputs
from zeropoint.errors import NonFiniteError, StateError

REFUSED = {
    "bert": "embeddings.LayerNorm, a norm, writes to the residual stream",
    "bert-masked": "bert.embeddings.LayerNorm, a norm, writes to the residual stream",
    "vit": "it has no token embeddings",
}
UNTIED = {"llama-tied", "qwen2", "gpt2", "opt", "t5-tied", "whisper"}
TRANSFORMERS = [name for name in ARCHITECTURES if name != "perceptron"]


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", [n for n in TRANSFORMERS if n not in REFUSED])
def test_the_model_answers_as_before_and_so_does_what_was_saved_of_it(name, tmp_path):
    model = build(name)
    expected, before = outputs(model), copy.deepcopy(model)
    report = zp.rotate(model, example=example_inputs(model))
    assert distance(outputs(model), expected) < 2e-6 and report.error < 2e-6
    rotated = dict(model.named_parameters())
    changed = {n for n, p in before.named_parameters() if not torch.equal(p, rotated[n])}
    heads = [f"{n}.weight" for n in report.untied]
    both = [f"{n}.weight" for n in (*report.readers, *report.writers)]
    assert changed >= {n for n in both if n in rotated} - {*heads}
    assert bool(report.untied) == (name in UNTIED)
    grown = sum(p.nbytes for n, p in rotated.items()) - sum(p.nbytes for p in before.parameters())
    assert report.bytes_after - report.bytes_before == grown
    model.save_pretrained(tmp_path)
    loaded, _ = zp.load(tmp_path)
    assert type(loaded) is type(model) and distance(outputs(loaded), expected) < 2e-6
    zp.quantize(loaded, "int8", strict=False)
    zp.freeze(loaded)
    assert distance(outputs(loaded), expected) < 0.05


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_cannot_be_rotated_is_refused_and_unchanged(name, reason):
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=f"cannot be rotated: {reason}"):
        zp.rotate(model, example=example_inputs(model))
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


class Hidden(nn.Module):
    """Reads the stream by its weight, without a graph: seen only by the check at the end."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = model.config

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, **batch):
        answer = self.model(**batch)
        own = self.model.get_input_embeddings().weight.detach()[:, :3].sum()
        answer.logits = answer.logits * (1 + own.sigmoid())
        return answer


def test_a_reader_that_nobody_saw_is_found_by_running_and_everything_is_put_back():
    model = Hidden(build("llama-tied"))
    before = copy.deepcopy(model.state_dict())
    batch = example_inputs(model.model)
    with pytest.raises(StateError, match="its answers would change by .* is the limit"):
        zp.rotate(model, example=batch)
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


def test_the_same_seed_gives_the_same_weights_and_another_others():
    models = [build("llama") for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        zp.rotate(model, seed=seed)
    first, second, third = (m.state_dict() for m in models)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])


def test_sixteen_bits_are_rounded_again_and_that_is_said():
    model = build("llama-tied").bfloat16()
    expected = outputs(model)
    report = zp.rotate(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "weights are rounded to bfloat16 again" in report.warnings[0]
    assert report.error < 1e-5, "of the float32 weights before they are rounded"
    assert distance(outputs(model).float(), expected.float()) < 0.05
    text = str(report)
    assert "lm_head has got a weight of its own" in text and "Hadamard 8 x 8" in text
    assert report.to_dict()["untied"] == ("lm_head",)


def test_outliers_are_spread():
    """One channel of the stream a hundred times larger: rounding to 4 bits loses much less."""
    losses = {}
    for rotated in (False, True):
        model = build("llama")
        with torch.no_grad():
            model.model.norm.weight[5] *= 100
            for layer in model.model.layers:
                layer.input_layernorm.weight[5] /= 100
                layer.self_attn.q_proj.weight[:, 5] *= 100
                layer.self_attn.k_proj.weight[:, 5] *= 100
                layer.self_attn.v_proj.weight[:, 5] *= 100
            model.model.norm.weight[5] /= 100
        expected = outputs(model)
        if rotated:
            zp.rotate(model)
        zp.quantize(model, "int4", group_size=-1, strict=False)
        zp.freeze(model)
        losses[rotated] = distance(outputs(model), expected)
    assert losses[True] < 0.6 * losses[False]


def test_states_in_which_nothing_is_rotated():
    model = build("llama")
    zp.quantize(model)
    with pytest.raises(StateError, match="rotate the float model, then quantize it"):
        zp.rotate(model)
    with pytest.raises(StateError, match="on the meta device"):
        zp.rotate(build("llama").to("meta"))
    with pytest.raises(StateError, match=r"not run on token ids alone .* give an example="):
        zp.rotate(build("whisper"))
    with pytest.raises(StateError, match="it has no token embeddings"):
        zp.rotate(nn.Sequential(nn.Linear(4, 4)))
    broken = build("llama")
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="answers NaN or Inf"):
        zp.rotate(broken)
