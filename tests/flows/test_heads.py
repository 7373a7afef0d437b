"""The importance of heads is a gradient, and what it calls least important costs least."""

from __future__ import annotations

import pytest
import torch
import transformers

import zeropoint as zp
from tests.models import VOCABULARY, build, example_inputs, outputs, perceptron, tokenizer
from zeropoint.errors import NonFiniteError, RecipeError, StateError, TextError
from zeropoint.flows.data import Calibration
from zeropoint.flows.heads import HeadImportance, masked
from zeropoint.model.attention import attentions

IDS = torch.randint(2, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(3))
WINDOWS = Calibration(window=8, tokens=64)


def labelled(model):
    inputs = example_inputs(model)
    return [inputs | {"labels": inputs.get("decoder_input_ids", inputs["input_ids"]).contiguous()}]


def finite_difference(model, example, layer: int, head: int, step: float) -> float:
    """(L(1 + step) - L(1 - step)) / (2 step), of one example; transformers' L is in float32."""
    losses = []
    for change in (step, -step):
        with torch.no_grad(), masked(attentions(model)) as masks:
            masks[layer][head] += change
            logits, labels = model(**example).logits[0].double(), example["labels"][0]
        if "decoder_input_ids" not in example and "bert" not in model.config.model_type:
            logits, labels = logits[:-1], labels[1:]
        losses.append(float(torch.nn.functional.cross_entropy(logits, labels)))
    return (losses[0] - losses[1]) / (2 * step)


@pytest.mark.parametrize(
    ("name", "step", "tolerance"),
    [
        ("gpt2", 1e-4, 1e-5),
        ("gpt-neox", 1e-4, 1e-5),
        ("bert-masked", 1e-4, 1e-5),
        ("llama", 1e-2, 1e-2),  # norms in float32: 6e-8 of a loss of 5, divided by the step
        ("t5-tied", 1e-2, 1e-2),
    ],
)
def test_the_score_is_the_mean_slope_of_the_loss(name, step, tolerance):
    model = build(name).double()
    importance = zp.head_importance(model, labelled(model), normalize=False)
    assert importance.examples == 2 and not importance.scores.isnan().any()
    (batch,) = labelled(model)
    examples = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
    for layer, head in ((0, 0), (1, 3), (len(importance.layers) - 1, 2)):
        slopes = [abs(finite_difference(model, e, layer, head, step)) for e in examples]
        score = float(importance.scores[layer, head])
        assert score == pytest.approx(sum(slopes) / 2, rel=tolerance)
        assert score > 1e-5


def test_layers_are_normalised_to_length_one():
    model = build("gpt2")
    plain = zp.head_importance(model, IDS, calibration=WINDOWS, normalize=False)
    normal = zp.head_importance(model, IDS, calibration=WINDOWS)
    assert torch.allclose(normal.scores.norm(dim=1), torch.ones(2).double())
    assert torch.allclose(normal.scores, plain.scores / plain.scores.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("state", ["live", "frozen"])
def test_a_quantized_model_has_nearly_the_scores_of_the_float_one(state):
    model = build("gpt2")
    expected = zp.head_importance(model, IDS, calibration=WINDOWS).scores
    zp.quantize(model, "int8")
    if state == "frozen":
        zp.freeze(model)
    scores = zp.head_importance(model, IDS, calibration=WINDOWS).scores
    assert torch.allclose(scores, expected, atol=0.05)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_texts_ids_and_text_of_its_own_are_data():
    model = build("llama")
    words = tokenizer()
    text = " ".join(f"w{i}" for i in IDS.flatten().tolist())
    options = {"calibration": WINDOWS}
    by_text = zp.head_importance(model, [text], tokenizer=words, **options)
    by_ids = zp.head_importance(model, IDS, **options)
    assert torch.equal(by_text.scores, by_ids.scores) and by_ids.examples == 3
    assert zp.head_importance(model, **options).examples == 8


def test_padding_is_not_counted():
    model = build("llama").double()
    short = {"input_ids": IDS[:1, :5], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    padded = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in short.items()}
    one, other = (zp.head_importance(model, [b]).scores for b in (short, padded))
    assert torch.allclose(one, other)


def test_a_mask_that_silences_heads_is_what_pruning_them_does():
    model = build("llama")
    with torch.no_grad(), masked(attentions(model)) as masks:
        masks[0][2:] = 0.0
        expected = outputs(model)
    zp.prune_heads(model, {0: [2, 3]})
    assert torch.allclose(outputs(model), expected, atol=1e-6)


def test_the_least_important_heads_can_be_pruned_and_scores_keep_their_numbers():
    model = build("gpt2")
    importance = zp.head_importance(model, IDS, calibration=WINDOWS)
    least = importance.least(3)
    assert sum(map(len, least.values())) == 3
    worst = importance.scores.flatten().sort().values[2]
    assert all(importance.scores[layer, head] <= worst for layer, h in least.items() for head in h)
    zp.prune_heads(model, least)
    after = zp.head_importance(model, IDS, calibration=WINDOWS)
    gone = [
        (layer, head) for layer in (0, 1) for head in range(4) if after.scores[layer, head].isnan()
    ]
    assert gone == [(layer, head) for layer in sorted(least) for head in least[layer]]
    assert "     -" in str(after) and repr(after) == str(after)
    assert not {*after.least(1).get(0, [])} & {*least.get(0, [])}


def table(scores, size):
    groups = [tuple(range(i, i + size)) for i in range(0, len(scores[0]), size)]
    return HeadImportance(
        layers=tuple(range(len(scores))),
        scores=torch.tensor(scores, dtype=torch.float64),
        groups=(tuple(groups),) * len(scores),
        examples=1,
    )


def test_every_layer_keeps_its_best_head():
    assert table([[0.1, 0.2, 0.3], [0.7, 0.8, 0.9]], 1).least(3) == {0: [0, 1], 1: [0]}


def test_heads_that_share_keys_go_together_by_their_mean():
    importance = table([[0.1, 0.9, 0.3, 0.4], [0.8, 0.8, 0.0, 0.5]], 2)
    assert importance.least(2) == {1: [2, 3]}
    assert importance.least(4) == {0: [2, 3], 1: [2, 3]}


@pytest.mark.parametrize("n", [1, 3, 6, 0, -2])
def test_a_number_of_heads_that_cannot_go_is_refused(n):
    with pytest.raises(RecipeError, match=f"^n={n} heads cannot go: they go 2 at a time, and 4 at"):
        table([[0.1, 0.9, 0.3, 0.4], [0.8, 0.8, 0.0, 0.5]], 2).least(n)


@pytest.mark.parametrize(
    ("model", "data", "error", "message"),
    [
        (perceptron, None, StateError, "no attention module whose heads are known"),
        (lambda: build("bert-masked"), [{"input_ids": IDS}], TextError, "needs labels; give ba"),
        (lambda: build("t5"), IDS, TextError, "loss of a T5ForConditionalGeneration needs labels"),
        (lambda: build("llama"), [], TextError, "calibration data is empty"),
        (
            lambda: build("llama").model,
            [{"input_ids": IDS, "labels": IDS}],
            StateError,
            r"a LlamaModel computes no loss; load it with a head, by zp\.load",
        ),
    ],
)
def test_what_has_no_loss_is_refused(model, data, error, message):
    with pytest.raises(error, match=message):
        zp.head_importance(model(), data)


def test_a_loss_that_is_not_finite_is_refused():
    model = build("llama")
    with pytest.raises(NonFiniteError, match="the loss of an example is nan; leave it out"):
        zp.head_importance(model, [{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}])
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert not any(m._forward_pre_hooks for m in model.modules())
