"""zeropoint finetune: trained, frozen, saved, drawn; interrupted, it goes on."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch

import zeropoint as zp
from zeropoint.cli.finetune import finetune
from zeropoint.errors import PlotError
from zeropoint.flows import qat

FAST = ("--steps", 4, "--window", 16, "--batch-tokens", 64, "--save-every", 2)


def test_it_writes_a_trained_checkpoint_and_a_picture(cli, llama, words, tmp_path):
    out = tmp_path / "out"
    ran = cli(
        *("finetune", llama, "-o", out, "--data", words, "--weights", "int3", "--json", "-"),
        *FAST,
        *("--learning-rate", 1e-3, "--patience", 9, "--seed", 3),
    )
    assert ran.code == 0, ran.err
    training = ran.json["training"]
    assert [step for step, _ in training["losses"]] == [1, 2, 3, 4] and training["tokens"] > 500
    assert training["held_out"][0][0] == 0 and training["best_step"] in (0, 4)
    model, tokenizer = zp.load(out)
    assert str(model.model.layers[0].mlp.up_proj.scheme) == "int3 g32 asymmetric"
    assert zp.verify(out) == [] and tokenizer is not None
    assert ran.json["bytes_after"] == zp.footprint(model).total_bytes
    assert (tmp_path / "out.losses.png").read_bytes().startswith(b"\x89PNG")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"out", "out.losses.png", words.name}
    for piece in ("wrote", "held-out loss", "int3 g32 asymmetric learned"):
        assert piece in ran.err, piece


def test_its_defaults_are_those_of_the_library():
    defaults = {n: p.default for n, p in inspect.signature(finetune).parameters.items()}
    fields = {f.name: f.default for f in dataclasses.fields(zp.Training) if f.name in defaults}
    assert len(fields) == 8
    assert fields == {name: defaults[name] for name in fields}


def test_scales_only_and_the_dtype_of_the_source(cli, llama, words, tmp_path):
    model, tokenizer = zp.load(llama)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    tokenizer.save_pretrained(tmp_path / "narrow")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules: [{match: '*', weights: int4, learned_scale: true}]\n")
    picture = tmp_path / "curve.png"
    ran = cli(
        *("finetune", tmp_path / "narrow", "-o", tmp_path / "out", "--data", words, *FAST),
        *("--recipe", recipe, "--scales-only", "--picture", picture),
    )
    assert ran.code == 0, ran.err
    loaded, _ = zp.load(tmp_path / "out")
    assert loaded.model.norm.weight.dtype == torch.bfloat16 and picture.is_file()
    assert str(loaded.model.embed_tokens.scheme) == "int4 g32 asymmetric"


def test_interrupted_it_goes_on(cli, llama, words, tmp_path, monkeypatch):
    command = ("finetune", llama, "-o", tmp_path / "out", "--data", words, "--json", "-", *FAST)
    steps = qat._step

    def step(run, on_step):
        if run.step == 3:
            raise KeyboardInterrupt
        steps(run, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(qat, "_step", step)
        ran = cli(*command)
    assert ran.code == 130 and "the same command goes on from there" in ran.err
    assert not (tmp_path / "out").exists() and (tmp_path / "out.training").is_dir()
    ran = cli(*command, "--steps", 5)
    assert ran.code == 2 and "unfinished run with another training" in ran.err
    done = []
    monkeypatch.setattr(qat, "_step", lambda run, say: (done.append(run.step), steps(run, say)))
    ran = cli(*command)
    assert ran.code == 0 and done == [2, 3] and not (tmp_path / "out.training").exists()
    assert len(ran.json["training"]["losses"]) == 4


def test_without_matplotlib_there_is_no_picture_and_a_word_about_it(
    cli, llama, words, tmp_path, monkeypatch
):
    def missing(*losses):
        raise PlotError("matplotlib is not installed")

    monkeypatch.setattr(zp.plot, "losses", missing)
    ran = cli("finetune", llama, "-o", tmp_path / "o", "--data", words, "--json", "-", *FAST)
    assert ran.code == 0 and ran.json["picture"] is None
    assert "no curve of the losses: matplotlib is not installed" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 0), "steps=0: use at least 1"),
        (("--weights", "bfloat16"), "learned_scale=True: bfloat16 has no scales"),
        (("--scales-only", "--no-learned-scale"), "no layer learns its scale"),
        (("--data", "nowhere.txt"), "nowhere.txt"),
        (("--json", "out/result.json"), "which will hold the checkpoint and nothing else"),
    ],
    ids=str,
)
def test_mistakes_are_errors(cli, llama, words, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    ran = cli("finetune", llama, "-o", "out", "--data", words, *FAST, *arguments)
    assert ran.code == 2 and message in ran.err
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())).count("out") == 1
