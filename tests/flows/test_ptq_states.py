"""float -> live -> frozen -> float: what each state holds and what each change keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeropoint as zp
from tests.models import PERCEPTRON_INPUT, build, outputs, perceptron
from zeropoint.errors import NonFiniteError, ScaleRangeError, StateError, UnknownNameError
from zeropoint.nn import QEmbedding, QLinear, QModule
from zeropoint.qtensor import QTensor

pytestmark = pytest.mark.usefixtures("torch_kernel")


def image(weight: torch.Tensor, scheme: zp.Scheme) -> torch.Tensor:
    """The quantized image of a weight, from the public functions."""
    return zp.numerics.fake_quantize(
        weight.detach(),
        scheme.format,
        granularity=scheme.granularity,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        float_zero_point=scheme.float_zero_point,
        scale_dtype=scheme.scale_dtype,
    )


# --- live -----------------------------------------------------------------------------------------


def test_a_live_model_holds_the_very_parameters_it_had():
    model = perceptron()
    before = dict(model.named_parameters())
    zp.quantize(model, "int4")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert type(model.embed) is QEmbedding and type(model.up) is QLinear and not model.up.frozen
    assert isinstance(model.up.weight, nn.Parameter) and model.up.weight.is_floating_point()
    assert model.head.weight is model.embed.weight, "still tied"


def test_a_live_model_computes_with_the_image_of_its_weights():
    model, expected = perceptron(), perceptron()
    zp.quantize(model, "int4")
    with torch.no_grad():
        for name in ("embed", "up", "down"):  # the head is the embedding
            weight = expected.get_submodule(name).weight
            weight.copy_(image(weight, model.get_submodule(name).scheme))
    assert str(model.up.scheme) == "int4 g32 asymmetric"
    assert str(model.head.scheme) == str(model.embed.scheme) == "int8 per channel"
    assert torch.equal(model(PERCEPTRON_INPUT), expected(PERCEPTRON_INPUT))
    assert not torch.equal(model(PERCEPTRON_INPUT), perceptron()(PERCEPTRON_INPUT))


def test_gradients_of_a_live_model_are_those_of_its_image():
    model, expected = perceptron(), perceptron()
    zp.quantize(model, "int4")
    with torch.no_grad():
        for name in ("embed", "up", "down"):
            weight = expected.get_submodule(name).weight
            weight.copy_(image(weight, model.get_submodule(name).scheme))
    for m in (model, expected):
        m(PERCEPTRON_INPUT).square().sum().backward()
    for name, wanted in expected.named_parameters():
        found = model.get_parameter(name).grad
        assert found is not None and found.abs().max() > 0, name
        assert torch.allclose(found, wanted.grad, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_a_live_model_lowers_its_loss_and_carries_over_to_frozen(kind):
    model = perceptron().train()
    zp.quantize(model, "int4")
    optimizer = kind(model.parameters(), lr=0.02)
    target = torch.tensor([1, 5, 7, 5])

    def loss():
        return nn.functional.cross_entropy(model(PERCEPTRON_INPUT), target)

    first = loss()
    for _ in range(8):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    last = loss()
    assert last < 0.7 * first
    if kind is torch.optim.AdamW:
        assert optimizer.state[model.up.weight]["exp_avg"].shape == model.up.weight.shape
    model.eval()
    trained = model(PERCEPTRON_INPUT)
    zp.freeze(model)
    assert torch.equal(model(PERCEPTRON_INPUT), trained)


def test_parameters_that_do_not_train_stay_so():
    model = perceptron()
    model.up.weight.requires_grad_(False)
    zp.quantize(model)
    assert not model.up.weight.requires_grad and model.down.weight.requires_grad


def test_modes_of_training_and_evaluation_survive():
    model = perceptron().train()
    model.up.eval()
    zp.quantize(model)
    assert (model.up.training, model.down.training) == (False, True)
    zp.freeze(model)
    zp.dequantize(model)
    assert (model.up.training, model.down.training) == (False, True)


# --- frozen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", ["int8", "int4", "int3", "nf4", "nvfp4", "float8_e4m3fn", "bfloat16"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_freezing_changes_no_output_and_leaves_no_float_weight(weights, dtype):
    model = perceptron().to(dtype)
    zp.quantize(model, weights)
    live = model(PERCEPTRON_INPUT)
    zp.freeze(model)
    assert torch.equal(model(PERCEPTRON_INPUT), live)
    assert [n for n, p in model.named_parameters() if p.dim() > 1] == []
    assert isinstance(model.up.weight, QTensor)
    assert model.up.weight.scheme.format == weights


def test_a_tied_weight_is_frozen_once():
    model = perceptron()
    zp.quantize(model)
    zp.freeze(model)
    assert model.head.tied_to is model.embed
    assert model.head.weight.packed is model.embed.weight.packed
    assert "head.weight" not in model.state_dict() and "embed.weight" in model.state_dict()


def test_freezing_reports_its_progress():
    model = perceptron()
    zp.quantize(model)
    steps = []
    zp.freeze(model, on_step=lambda *step: steps.append(step))
    assert steps == [("embed", 0, 3), ("up", 1, 3), ("down", 2, 3), ("", 3, 3)]  # head is tied


def test_a_model_that_is_partly_live_can_be_frozen_to_the_end():
    """Ctrl-C in the middle loses nothing: freezing again goes on where it stopped."""
    model = perceptron()
    zp.quantize(model)
    live = model(PERCEPTRON_INPUT)

    def interrupt(name, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zp.freeze(model, on_step=interrupt)
    assert model.up.frozen and not model.down.frozen
    assert torch.equal(model(PERCEPTRON_INPUT), live)
    zp.freeze(model)
    assert torch.equal(model(PERCEPTRON_INPUT), live)
    assert model.head.tied_to is model.embed, "stored once, however often it was interrupted"


# --- back to float --------------------------------------------------------------------------------


def test_dequantizing_a_live_model_gives_back_the_very_parameters():
    model = perceptron()
    before = dict(model.named_parameters())
    kinds = [type(m) for m in model.modules()]
    expected = model(PERCEPTRON_INPUT)
    zp.quantize(model, "int2")
    zp.dequantize(model)
    assert [type(m) for m in model.modules()] == kinds
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert torch.equal(model(PERCEPTRON_INPUT), expected)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_dequantizing_a_frozen_model_gives_the_image_and_keeps_ties(weights):
    model = perceptron()
    zp.quantize(model, weights)
    zp.freeze(model)
    frozen, stored = model(PERCEPTRON_INPUT), model.up.weight
    zp.dequantize(model)
    assert type(model.up) is nn.Linear and type(model.embed) is nn.Embedding
    assert torch.equal(model.up.weight, stored.dequantize())
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(PERCEPTRON_INPUT), frozen)
    assert zp.footprint(model).total_bytes == zp.footprint(perceptron()).total_bytes


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5"])
def test_a_transformers_model_comes_back_with_the_same_modules(name):
    model = build(name)
    kinds = {n: type(m) for n, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    expected = outputs(model)
    zp.quantize(model, "int4", strict=False)
    zp.dequantize(model)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert all(parameters[n] is p for n, p in model.named_parameters())
    assert torch.equal(outputs(model), expected)
    zp.quantize(model, "int4", strict=False)
    zp.freeze(model)
    frozen = outputs(model)
    zp.dequantize(model)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in parameters.items()
    }
    assert torch.allclose(outputs(model), frozen, rtol=0, atol=1e-5 * frozen.abs().max().item())


def test_quantizing_what_was_dequantized_finds_the_same_codes():
    model = perceptron()
    zp.quantize(model, "int8")
    zp.freeze(model)
    once = {n: m.weight.codes for n, m in model.named_modules() if isinstance(m, QModule)}
    zp.dequantize(model)
    zp.quantize(model, "int8")
    zp.freeze(model)
    assert once.keys() == {"embed", "up", "down", "head"}
    assert all(torch.equal(model.get_submodule(n).weight.codes, c) for n, c in once.items())


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_quantizing_twice_is_refused(frozen):
    model = perceptron()
    zp.quantize(model)
    if frozen:
        zp.freeze(model)
    with pytest.raises(StateError, match=r"quantized already; call zp\.dequantize\(model\) first"):
        zp.quantize(model, "int4")
    assert model.up.scheme.format == "int8"


def test_freezing_what_is_not_quantized_is_refused():
    with pytest.raises(StateError, match=r"not quantized; call zp\.quantize\(model\) first"):
        zp.freeze(perceptron())


def test_freezing_twice_is_refused():
    model = perceptron()
    zp.quantize(model)
    zp.freeze(model)
    with pytest.raises(StateError, match="nothing to freeze: the model is frozen already"):
        zp.freeze(model)


def test_dequantizing_a_float_model_is_refused():
    with pytest.raises(StateError, match="nothing to dequantize: the model is not quantized"):
        zp.dequantize(perceptron())


def test_an_unknown_algorithm_is_refused_with_the_nearest():
    model = perceptron()
    zp.quantize(model)
    with pytest.raises(UnknownNameError, match="'rnt'.*'rtn'"):
        zp.freeze(model, "rnt")
    assert not model.up.frozen


@pytest.mark.parametrize(
    ("kind", "model"),
    [("Linear", nn.Linear(32, 4)), ("Embedding", nn.Embedding(4, 32))],
    ids=["Linear", "Embedding"],
)
def test_a_model_that_is_a_single_layer_cannot_be_replaced_in_place(kind, model):
    message = rf"itself a {kind} and cannot be replaced.*torch\.nn\.Sequential\(model\)"
    with pytest.raises(StateError, match=message):
        zp.quantize(model)
    wrapped = nn.Sequential(model)
    zp.quantize(wrapped)
    assert isinstance(wrapped[0], QModule)


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(StateError, match="^0.weight: on the meta device.*load the weights first"):
        zp.quantize(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("value", "error"), [(float("nan"), NonFiniteError), (1e9, ScaleRangeError)]
)
def test_a_weight_that_training_spoiled_is_refused_by_name_when_frozen(value, error):
    model = perceptron()
    zp.quantize(model, "int4")
    with torch.no_grad():
        model.down.weight[3, 5] = value
    with pytest.raises(error, match=r"^down\.weight: "):
        zp.freeze(model)
    with torch.no_grad():
        model.down.weight[3, 5] = 0.0
    zp.freeze(model)
    assert model.down.frozen and isinstance(model.down.weight, QTensor)
