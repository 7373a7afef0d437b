"""zp.finetune: a live model learns to answer as its float model does."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch

import zeropoint as zp
from tests.helpers import in_child
from tests.models import ARCHITECTURES, bert, build, example_inputs, llama, outputs, tokenizer
from zeropoint.checkpoints import training as files
from zeropoint.errors import (
    CheckpointError,
    NonFiniteError,
    RecipeError,
    StateError,
    TextError,
)
from zeropoint.flows import qat

pytestmark = pytest.mark.usefixtures("torch_kernel")

SMALL = {"window": 16, "batch_tokens": 64, "check_every": 4, "save_every": 4, "held_out": 0.2}


def tokens(count=640, seed=0):
    return torch.randint(1, 99, (count,), generator=torch.Generator().manual_seed(seed))


def sharp(build=lambda: llama(tied=True)):
    """A model whose answers depend on its weights: random ones of the usual size say nothing."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model.eval()


def live(model=None, **options):
    model = model or sharp()
    zp.quantize(model, **({"weights": "int3", "group_size": 32, "learned_scale": True} | options))
    return model


def settings(**options):
    return zp.Training(**(SMALL | {"steps": 16, "learning_rate": 1e-3} | options))


def state(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- what it does ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 1e-3),
        ({"learned_scale": None}, 1e-3),
        ({"weights": "nf4"}, 1e-4),
        ({"activations": "int8"}, 1e-3),
        ({"weights": "int4", "learned_scale": None, "activations": "float8_e4m3fn"}, 1e-4),
    ],
    ids=str,
)
def test_the_model_comes_nearer_to_its_teacher(options, rate):
    original = sharp()
    model = live(copy.deepcopy(original), **options)
    report = zp.finetune(model, tokens(), training=settings(learning_rate=rate))
    before, after = report.held_out[0][1], dict(report.held_out)[report.best_step]
    assert after < 0.95 * before
    assert [step for step, _ in report.losses] == list(range(1, 17))
    assert [step for step, _ in report.held_out] == [0, 4, 8, 12, 16]
    assert report.tokens == 640 and report.source == "token ids"
    assert f"held-out loss {before:.4g} -> {after:.4g}" in str(report)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    # The teacher was a copy: the same as the model it came from.
    ids = {"input_ids": tokens()[:32].view(2, 16)}
    found = qat.distance(model(**ids), original(**ids), ids)
    rounded = qat.distance(live(copy.deepcopy(original), **options)(**ids), original(**ids), ids)
    assert found < rounded


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_learns(name):
    model = build(name)
    zp.quantize(model, "int3", group_size=16, learned_scale=True, strict=False)
    batches = [example_inputs(model) for _ in range(4)]
    training = zp.Training(steps=3, learning_rate=1e-4, held_out=0.3, check_every=1)
    report = zp.finetune(model, batches, training=training)
    assert dict(report.held_out)[report.best_step] < report.held_out[0][1]
    before = outputs(model)
    zp.freeze(model)
    assert torch.allclose(outputs(model), before, rtol=0, atol=1e-5 * before.abs().max().item())


def test_freezing_and_saving_keep_what_was_learned(tmp_path):
    model = live()
    zp.finetune(model, tokens(), training=settings())
    ids = tokens(32, seed=5).view(2, 16)
    y = model(input_ids=ids).logits
    zp.freeze(model)
    bound = 1e-5 * y.abs().max()  # only the order of sums differs
    assert torch.allclose(model(input_ids=ids).logits, y, rtol=0, atol=bound.item())
    zp.save(model, tmp_path / "out")
    loaded, _ = zp.load(tmp_path / "out")
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_scales_only_leaves_the_weights_as_they_are():
    model = live()
    before = state(model)
    zp.finetune(model, tokens(), training=settings(parameters="scales", scale_learning_rate=0.01))
    changed = {n for n, t in state(model).items() if not torch.equal(t, before[n])}
    assert changed and all(n.endswith(("_scale", "_zero_point")) for n in changed)
    assert any(n.endswith("_scale") for n in changed)
    assert all(p.requires_grad for p in model.parameters()), "as before"


def test_what_is_frozen_by_the_user_stays():
    model = live()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.detach().clone()
    zp.finetune(model, tokens(), training=settings(steps=4))
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not model.model.embed_tokens.weight.requires_grad


def test_the_best_state_seen_is_kept_and_patience_ends_a_run():
    model = live()
    options = settings(steps=200, learning_rate=0.3, patience=2)  # too fast: it only gets worse
    before = state(model)
    report = zp.finetune(model, tokens(), training=options)
    assert report.best_step == 0 and len(report.losses) == 8 and len(report.held_out) == 3
    assert same(state(model), before)


def test_held_out_text_is_tried_without_dropout():
    torch.manual_seed(0)
    model = live(sharp(lambda: build("gpt2")), learned_scale=None)
    model.train()
    report = zp.finetune(model, tokens(), training=settings(steps=1, learning_rate=1e-9))
    first, last = (loss for _, loss in report.held_out)
    assert last == pytest.approx(first, rel=1e-3), "a step of 1e-9 changes next to nothing"
    assert all(m.training for m in model.modules()), "as it was"


def test_without_held_out_batches_the_last_state_is_the_result():
    report = zp.finetune(live(), tokens(), training=settings(held_out=0.0, steps=3))
    assert report.held_out == () and report.best_step == 3


def test_observers_run_first_and_then_the_ranges_are_fixed():
    model = live(activations="int8")
    options = settings(observer="minmax", observer_steps=6)
    report = zp.finetune(model, tokens(), training=options)
    rows = zp.calibration_table(model).rows
    batches = report.tokens // 64 - 2  # of the rest; two are held out
    assert {row.samples for row in rows} == {6 * 64} and batches == 8
    assert [step for step, _ in report.held_out] == [0, 8, 12, 16]
    assert report.best_step >= 8, "before that the inputs had no ranges"


def test_an_encoder_follows_its_outputs():
    model = live(sharp(bert))
    texts = ["one two three four five\n\nsix seven eight nine\n\n" + "ten two six\n\n" * 3] * 2
    batches = [
        {"input_ids": tokens(24, seed=i).view(2, 12), "attention_mask": torch.ones(2, 12)}
        for i in range(6)
    ]
    report = zp.finetune(model, batches, training=settings(steps=12))
    assert dict(report.held_out)[report.best_step] < report.held_out[0][1]
    report = zp.finetune(
        model, texts, tokenizer=tokenizer(), teacher=sharp(bert), training=settings(steps=2)
    )
    assert len(report.losses) == 2


def test_it_writes_its_own_text():
    report = zp.finetune(live(), "self", training=settings(steps=2, tokens=64))
    assert report.source == "text the model wrote itself"


# --- resumed --------------------------------------------------------------------------------------


def final_state(say, folder, kill_at, observer):
    """Train in this process, with one thread; SIGKILL itself after `kill_at` steps."""
    torch.set_num_threads(1)
    model = live(activations="int8" if observer else None)
    model.train()
    steps = qat._step

    def step(run, on_step):
        if run.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        steps(run, on_step)

    qat._step = step  # this process does nothing else
    options = settings(observer=observer, observer_steps=3)
    report = zp.finetune(model, tokens(), training=options, folder=folder)
    return {n: t.numpy() for n, t in state(model).items()}, report.losses, report.held_out


@pytest.mark.parametrize("observer", [None, "minmax"])
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(tmp_path, observer):
    expected, losses, checks = in_child(final_state, tmp_path / "whole", None, observer)
    for moment in (5, 15):
        with pytest.raises(AssertionError, match="-9|SIGKILL|signal 9"):
            in_child(final_state, tmp_path / "run", moment, observer)
    found, *rest = in_child(final_state, tmp_path / "run", None, observer)
    assert rest == [losses, checks]
    assert found.keys() == expected.keys()
    assert all(found[n].tobytes() == expected[n].tobytes() for n in found)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [files.FILE]


def test_ctrl_c_keeps_what_was_saved_between_two_steps(tmp_path, monkeypatch):
    whole = zp.finetune(live(), tokens(), training=settings(), folder=tmp_path / "whole")
    steps = qat._step

    def step(run, on_step):
        if run.step == 6:
            raise KeyboardInterrupt
        steps(run, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(qat, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            zp.finetune(live(), tokens(), training=settings(), folder=tmp_path / "run")
    _, left = files.read_state(tmp_path / "run")
    assert left["step"] == 4, "the interruption may come in the middle of an update"
    again = zp.finetune(live(), tokens(), training=settings(), folder=tmp_path / "run")
    assert again == whole


def test_a_finished_run_is_not_done_again(tmp_path, monkeypatch):
    model = live()
    first = zp.finetune(model, tokens(), training=settings(), folder=tmp_path)
    monkeypatch.setattr(qat, "_step", None)
    again = live()
    assert zp.finetune(again, tokens(), training=settings(), folder=tmp_path) == first
    assert same(state(again), state(model))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"training": settings(steps=5)}, "training"),
        ({"data": tokens(seed=1)}, "data"),
        ({"model": {"group_size": 64}}, "recipe"),
        ({"teacher": True}, "teacher"),
    ],
    ids=["training", "data", "recipe", "teacher"],
)
def test_another_run_in_the_folder_is_refused(tmp_path, change, what):
    zp.finetune(live(), tokens(), training=settings(steps=4), folder=tmp_path)
    options = {"training": settings(steps=4), "data": tokens()} | change
    model = live(**options.pop("model", {}))
    if "teacher" in options:
        options["teacher"] = build("llama-tied")
    with pytest.raises(CheckpointError, match=f"unfinished run with another {what}"):
        zp.finetune(model, folder=tmp_path, **options)
    zp.finetune(model, folder=tmp_path, fresh=True, **options)


def test_a_damaged_state_is_refused(tmp_path):
    zp.finetune(live(), tokens(), training=settings(steps=4), folder=tmp_path)
    path = tmp_path / files.FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="is not the state of a training run .* fresh=True"):
        zp.finetune(live(), tokens(), training=settings(steps=4), folder=tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file cannot be made: File exists"):
        zp.finetune(live(), tokens(), training=settings(steps=4), folder=tmp_path / "file")


# --- frozen models --------------------------------------------------------------------------------


def frozen(original, weights="int3", **options):
    model = copy.deepcopy(original)
    zp.quantize(model, weights, **options)
    zp.freeze(model)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "int3", "symmetric": True},
        {"weights": "nf4"},
        {"weights": "any4", "group_size": 16},
        {"weights": "e8p", "group_size": 16},
        {"weights": "float8_e5m2"},
        {"weights": "int4", "activations": "int8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("parameters", ["all", "scales"])
def test_scales_of_a_frozen_model_learn_and_its_codes_stay(tmp_path, options, parameters):
    original = sharp()
    model = frozen(original, **options)
    before = state(model)
    report = zp.finetune(
        model,
        tokens(),
        teacher=original,
        training=settings(parameters=parameters, scale_learning_rate=3e-3),
    )
    assert dict(report.held_out)[report.best_step] < 0.98 * report.held_out[0][1]
    after = state(model)
    assert list(after) == list(before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    kinds = {"weight_scale"} if parameters == "scales" else {"weight_scale", "layernorm.weight"}
    assert all(any(name.endswith(kind) for kind in kinds | {"norm.weight"}) for name in changed)
    assert any(name.endswith("weight_scale") for name in changed)
    assert any(name.endswith("norm.weight") for name in changed) == (parameters == "all")
    assert all(after[name].dtype == before[name].dtype for name in after)
    assert all(not n.endswith("scale") for n, _ in model.named_parameters())
    ids = {"input_ids": tokens(32, seed=5).view(2, 16)}
    zp.save(model, tmp_path / "out")
    loaded, _ = zp.load(tmp_path / "out")
    assert torch.equal(loaded(**ids).logits, model(**ids).logits)


def test_the_gradient_of_a_scale_is_that_of_the_dequantized_weight():
    model = frozen(sharp())
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, layer.in_features)
    layer.free_scale()
    (layer(x).square().sum()).backward()
    found = layer.grid.scale.grad
    layer.fix_scale()
    weight = layer.qweight.dequantize().requires_grad_()
    ((x @ weight.T).square().sum()).backward()
    scale = layer.qweight.scale.float()
    levels = weight.detach().view(*scale.shape, -1) / scale.unsqueeze(-1)
    expected = (weight.grad.view(levels.shape) * levels).sum(-1)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_run_on_a_frozen_model_that_fails_leaves_its_scales():
    original = sharp()
    model = frozen(original)
    before = state(model)
    with torch.no_grad():
        original.model.norm.weight[0] = float("inf")
    with pytest.raises(NonFiniteError, match="the loss is nan at step 0"):
        zp.finetune(model, tokens(), teacher=original, training=settings(held_out=0.0))
    assert same(state(model), before)


def test_scales_of_either_sign_learn():
    """Their mean is near 0, and so would be a rate that is a share of it."""
    original = sharp()
    model = copy.deepcopy(original)
    zp.quantize(model, "int3", symmetric=True)
    zp.freeze(model, "mse")
    before = model.model.layers[0].mlp.up_proj.qweight.scale.float()
    assert bool((before < 0).any()) and bool((before > 0).any())
    training = settings(parameters="scales", scale_learning_rate=3e-3)
    report = zp.finetune(model, tokens(), teacher=original, training=training)
    assert dict(report.held_out)[report.best_step] < 0.98 * report.held_out[0][1]
    after = model.model.layers[0].mlp.up_proj.qweight.scale.float()
    assert bool((after * before > 0).all())


def test_a_scale_that_learned_to_be_nothing_is_stored_as_the_least():
    model = frozen(sharp(), "int4")
    layer = model.model.layers[0].mlp.up_proj
    layer.free_scale()
    with torch.no_grad():
        layer.grid.scale[0, 0] = -1.0
    layer.fix_scale()
    assert 0 < layer.qweight.scale[0, 0] < 1e-4


@pytest.mark.parametrize(
    "options", [{"weights": "nf4", "double_quant": True}, {"weights": "mxfp4"}]
)
def test_scales_stored_in_8_bits_stay(options):
    original = sharp()
    model = frozen(original, **options)
    training = settings(parameters="scales")
    with pytest.raises(RecipeError, match="no layer learns its scale"):
        zp.finetune(model, tokens(), teacher=original, training=training)


# --- refusals -------------------------------------------------------------------------------------


def test_only_a_quantized_model_is_trained_and_a_frozen_one_needs_a_teacher():
    with pytest.raises(StateError, match="the model is not quantized, and a float one has nothing"):
        zp.finetune(sharp(), tokens())
    model = live()
    zp.freeze(model)
    with pytest.raises(StateError, match="embed_tokens is frozen, so .*give the float model as te"):
        zp.finetune(model, tokens())


def test_scales_have_to_be_learned():
    with pytest.raises(RecipeError, match="no layer learns its scale; .*learned_scale=True"):
        zp.finetune(live(learned_scale=None), tokens(), training=settings(parameters="scales"))


def test_something_has_to_be_trained():
    with pytest.raises(RecipeError, match="no parameter of the model requires a gradient"):
        zp.finetune(live().requires_grad_(False), tokens())


def test_nobody_is_their_own_teacher():
    model = live()
    with pytest.raises(StateError, match="its own teacher; leave teacher out"):
        zp.finetune(model, tokens(), teacher=model)


def test_texts_need_a_tokenizer():
    with pytest.raises(TextError, match="need a tokenizer"):
        zp.finetune(live(), ["some text"])


def test_a_loss_that_is_no_number_ends_the_run():
    model = live()
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(
        NonFiniteError, match=r"the loss is nan at step 0; use a smaller learning_r"
    ):
        zp.finetune(model, tokens(), teacher=sharp(), training=settings(held_out=0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: use at least 1"),
        ({"patience": 0}, "patience=0: use at least 1"),
        ({"learning_rate": float("inf")}, "learning_rate=inf is not a positive number"),
        ({"scale_learning_rate": -1.0}, "scale_learning_rate=-1.0 is not a positive number"),
        ({"held_out": 1.0}, "held_out=1.0 is not a share, 0 or more and less than 1"),
        ({"parameters": "biases"}, "parameters='biases': use 'all' or 'scales'"),
        ({"observer": "mse", "steps": 20}, "observer_steps=20 leaves none of steps=20"),
        ({"window": 1}, "window=1: use at least 4"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        zp.Training(**options).calibration  # noqa: B018
