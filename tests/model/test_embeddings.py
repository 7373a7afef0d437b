"""More tokens, or fewer: float, live and frozen, saved and loaded again."""

from __future__ import annotations

import pytest
import torch

import zeropoint as zp
from tests.helpers import schemes
from tests.models import (
    ARCHITECTURES,
    build,
    continuation,
    llama,
    outputs,
    perceptron,
    tokenizer,
)
from zeropoint.errors import RecipeError, StateError
from zeropoint.scheme import Recipe, Rule, Scheme

LEFT_OUT = ("vit", "bert", "qwen2", "mistral", "opt")  # without logits, or like others
WITH_LOGITS = [name for name in ARCHITECTURES if name not in LEFT_OUT]
OLD = 99
pytestmark = pytest.mark.usefixtures("torch_kernel")
every_state = pytest.mark.parametrize("state", ["float", "live", "frozen"])


def in_state(name: str, state: str, weights: str = "int4"):
    model = build(name)
    if state != "float":
        zp.quantize(model, weights)
    if state == "frozen":
        zp.freeze(model)
    return model


def saved_and_loaded(model, path):
    """The model after a round through files."""
    if any(hasattr(m, "scheme") for m in model.modules()):
        zp.save(model, path)
    else:
        model.save_pretrained(path)
    return zp.load(path)[0]


@every_state
@pytest.mark.parametrize("name", WITH_LOGITS)
def test_old_tokens_are_what_they_were_and_new_ones_work(name, state, tmp_path):
    model = in_state(name, state)
    before = outputs(model)
    report = zp.resize_token_embeddings(model, 103)
    after = outputs(model)
    assert torch.equal(after[..., :OLD], before) and after.shape[-1] == 103
    assert model.config.get_text_config().vocab_size == 103
    assert report.bytes_after > report.bytes_before
    assert {c.shape_after for c in report.changes} == {(103, 64)}
    if state == "live":
        return
    again = saved_and_loaded(model, tmp_path / "m")
    assert torch.equal(outputs(again), after)
    if again.can_generate() and "input_ids" in again.dummy_inputs:
        assert torch.equal(continuation(again), continuation(model))


@every_state
@pytest.mark.parametrize("name", ["llama", "bert-masked", "t5"])
def test_fewer_tokens_leave_the_others_as_they_were(name, state):
    """The examples have tokens up to 98: those of the first 90 are computed as before."""
    model = in_state(name, state)
    ids = torch.arange(2, 11).unsqueeze(0)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if "t5" in name else {})
    with torch.no_grad():
        before = model(**inputs).logits
        zp.resize_token_embeddings(model, 90)
        assert torch.equal(model(**inputs).logits, before[..., :90])


def storage(model) -> set[int]:
    """The memory of the token embeddings and of the head."""
    found = set()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = module.weight
        found.add(getattr(weight, "packed", weight).data_ptr())
    return found


@every_state
@pytest.mark.parametrize("name", ["llama", "llama-tied", "bert-masked", "t5", "t5-tied"])
@pytest.mark.parametrize("n", [90, 103])
def test_tied_weights_stay_tied_and_others_not(name, state, n):
    """The T5 has a head of its own, as flan-T5 has, though its configuration says it is tied."""
    model = in_state(name, state)
    one = len(storage(model)) == 1
    zp.resize_token_embeddings(model, n)
    assert (len(storage(model)) == 1) == one == (name not in ("llama", "t5"))
    if "t5" in name:
        assert model.config.tie_word_embeddings


EMBEDDING_SCHEMES = [s for s in schemes() if s.fmt.kind != "downcast"]


@pytest.mark.parametrize("scheme", EMBEDDING_SCHEMES, ids=str)
def test_frozen_rows_are_kept_bit_for_bit_by_every_scheme(scheme):
    """First more rows, then fewer."""
    model = llama(layers=1).eval()
    zp.quantize(model, recipe=Recipe(rules=(Rule(match="*", scheme=scheme),)))
    zp.freeze(model)
    ends = {m: m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for n in (110, 90):
        zp.resize_token_embeddings(model, n, mean_resizing=False)
        for module, old in ends.items():
            new = module.weight
            assert new.scheme == scheme and new.shape == (n, 64) == module.shape
            assert torch.equal(new.dequantize()[:OLD], old.dequantize()[:n])
            for suffix, part in new.parts.items():
                both = [p.view(-1).view(torch.uint8) for p in (part, old.parts[suffix])]
                common = min(map(len, both))
                assert torch.equal(both[0][:common], both[1][:common])


@every_state
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_and_biases_are_near_the_mean_of_the_old_ones(state, tied):
    """Biases of a tied head are 0, as transformers has it."""
    model = build("bert-masked")
    head = model.cls.predictions
    if not tied:
        model.config.tie_word_embeddings = False
        head.decoder.weight = torch.nn.Parameter(head.decoder.weight.detach() + 1)
    if state != "float":
        zp.quantize(model, "int8")
    if state == "frozen":
        zp.freeze(model)
    bias = head.bias.detach().clone()
    before = [real(m) for m in (model.get_input_embeddings(), head.decoder)]
    zp.resize_token_embeddings(model, 120)
    after = [real(m) for m in (model.get_input_embeddings(), head.decoder)]
    for old, new in zip(before, after, strict=True):
        mean = old.mean(0)
        spread = 6 * (1e-9 * old.var(0).max()) ** 0.5  # six deviations, and half a step of int8
        step = mean.abs().max() / 127 if state == "frozen" else 0.0
        assert (new[OLD:] - mean).abs().max() <= spread + step / 2 + 1e-6
    assert torch.equal(head.bias[:OLD], bias) and len(head.bias) == 120
    expected = 0.0 if tied else bias.mean()
    assert (head.bias[OLD:] - expected).abs().max() <= 6e-9 * bias.std() + 1e-8
    assert head.decoder.bias is head.bias


def real(module) -> torch.Tensor:
    weight = module.weight
    return weight.detach().clone() if isinstance(weight, torch.Tensor) else weight.dequantize()


def test_without_mean_resizing_new_rows_are_as_the_model_initialises_them():
    model = in_state("llama", "frozen", "int8")
    torch.manual_seed(0)
    zp.resize_token_embeddings(model, 1099, mean_resizing=False)
    new = model.get_input_embeddings().weight.dequantize()[OLD:]
    std = model.config.initializer_range
    deviation = 6 * std / (2 * new.numel()) ** 0.5
    assert abs(float(new.std()) - std) <= deviation + std / 127
    assert abs(float(new.mean())) <= 6 * std / new.numel() ** 0.5


@every_state
def test_a_number_is_rounded_up_to_a_multiple(state):
    model = in_state("llama-tied", state)
    zp.resize_token_embeddings(model, 100, pad_to_multiple_of=64)
    assert model.config.vocab_size == 128 == len(real(model.get_input_embeddings()))
    assert outputs(model).shape[-1] == 128


@every_state
def test_the_same_number_changes_nothing(state):
    model = in_state("llama", state)
    memory, before = storage(model), outputs(model)
    report = zp.resize_token_embeddings(model, OLD)
    assert report.changes == () and report.bytes_before == report.bytes_after
    assert storage(model) == memory and torch.equal(outputs(model), before)


def test_biases_for_tokens_outside_of_the_head_are_resized_too(tmp_path):
    """BART adds `final_logits_bias`, a buffer of the model."""
    import transformers

    config = transformers.BartConfig(
        vocab_size=OLD,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        forced_eos_token_id=None,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    model.final_logits_bias.normal_()
    zp.quantize(model, "int8", strict=False)  # BART's embedding is a class of its own
    zp.freeze(model)
    before = outputs(model)
    zp.resize_token_embeddings(model, 104)
    assert model.final_logits_bias.shape == (1, 104)
    assert torch.equal(outputs(model)[..., :OLD], before)
    assert torch.equal(outputs(saved_and_loaded(model, tmp_path / "m")), outputs(model))


def test_a_resized_model_can_be_dequantized_and_a_live_one_trained():
    model = in_state("llama-tied", "live")
    zp.resize_token_embeddings(model, 103)
    loss = model(torch.tensor([[5, 101, 102]]), labels=torch.tensor([[5, 101, 102]])).loss
    loss.backward()
    assert model.get_input_embeddings().weight.grad[101].any()
    zp.freeze(model)
    before = outputs(model)
    zp.dequantize(model)
    assert torch.allclose(outputs(model), before, atol=1e-5)
    assert model.lm_head.out_features == 103 and model.model.embed_tokens.num_embeddings == 103


def test_the_padding_index_is_dropped_with_its_row():
    model = in_state("bert", "frozen")
    embedding = model.get_input_embeddings()
    embedding.padding_idx = 95
    zp.resize_token_embeddings(model, 96)
    assert embedding.padding_idx == 95
    zp.resize_token_embeddings(model, 90)
    assert embedding.padding_idx is None


def test_the_report_names_what_changed():
    model = in_state("llama", "frozen")
    assert str(zp.resize_token_embeddings(model, 103)) == (
        "0.06 -> 0.06 MB, 2 weights changed\n"
        "  model.embed_tokens: 99 x 64 -> 103 x 64, int8 per channel\n"
        "  lm_head: 99 x 64 -> 103 x 64, int8 per channel"
    )


@pytest.mark.parametrize("n", [0, -3, 2.5, True, None, "9"])
def test_a_number_of_tokens_is_a_positive_integer(n):
    with pytest.raises(RecipeError, match=rf"^n={n!r} is not a positive integer; .*len\(tokeni"):
        zp.resize_token_embeddings(build("llama"), n)


@pytest.mark.parametrize("multiple", [0, -8, 0.5, False])
def test_a_multiple_is_a_positive_integer(multiple):
    message = rf"^pad_to_multiple_of={multiple!r} is not a positive integer; use 64"
    with pytest.raises(RecipeError, match=message):
        zp.resize_token_embeddings(build("llama"), 100, pad_to_multiple_of=multiple)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (perceptron, "^Perceptron is not a transformers model.*before zp.quantize"),
        (lambda: build("vit"), "has no token embeddings: its input embedding is a ViTPatch"),
    ],
)
def test_a_model_without_token_embeddings_is_refused(model, message):
    with pytest.raises(StateError, match=message):
        zp.resize_token_embeddings(model(), 100)


def test_a_model_that_transformers_cannot_resize_keeps_its_modules(monkeypatch):
    model = in_state("llama", "frozen")

    def cannot(*_):
        raise NotImplementedError("use the decoder's")

    monkeypatch.setattr(type(model), "resize_token_embeddings", cannot)
    before, memory = outputs(model), storage(model)
    with pytest.raises(StateError, match="LlamaForCausalLM cannot be resized: use the decoder's"):
        zp.resize_token_embeddings(model, 100)
    assert storage(model) == memory and torch.equal(outputs(model), before)


def test_a_model_without_an_input_embedding_of_its_own_is_refused(monkeypatch):
    model = build("llama")

    def none(_):
        raise NotImplementedError

    monkeypatch.setattr(type(model), "get_input_embeddings", none)
    with pytest.raises(StateError, match="no token embeddings: its input embedding is none"):
        zp.resize_token_embeddings(model, 100)


def test_learned_scales_are_refused():
    model = build("llama")
    scheme = Scheme(format="int8", learned_scale=True)
    zp.quantize(model, recipe=Recipe(rules=(Rule(match="*", scheme=scheme),)))
    with pytest.raises(StateError, match="model.embed_tokens learns its scales.*zp.freeze"):
        zp.resize_token_embeddings(model, 100)


def test_transformers_own_resizing_of_a_frozen_model_says_what_to_call():
    model = in_state("llama", "frozen")
    with pytest.raises(AttributeError, match=r"zp\.resize_token_embeddings\(model, n\)"):
        model.resize_token_embeddings(100)


def test_a_tokenizer_with_a_token_more(tmp_path):
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    model = in_state("llama-tied", "frozen")
    zp.resize_token_embeddings(model, len(words))
    zp.save(model, tmp_path / "m", tokenizer=words)
    again, words = zp.load(tmp_path / "m")
    ids = words("w5 <tool> w7", return_tensors="pt").input_ids
    assert ids[0].tolist() == [5, 99, 7]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
