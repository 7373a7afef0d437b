"""The native format: what is written is what is read, and damage is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

import zeropoint as zp
from tests.helpers import defaults, example_weight, rtn
from tests.models import build, outputs
from zeropoint.checkpoints import native
from zeropoint.errors import CheckpointError, ZeropointError
from zeropoint.scheme import Recipe, Rule, Scheme

from .cases import (
    INPUT,
    Small,
    edit_manifest,
    edit_tensors,
    output_of,
    read_manifest,
    small,
    write_manifest,
)

RECIPE = Recipe(rules=(Rule(match="*", scheme=Scheme.of("int8")),))


def write(path, contents, overwrite=False):
    with native.write(path, contents, overwrite=overwrite):
        pass


def both_refuse(path, message):
    """`verify` lists the problem and `load` raises with it."""
    problems = zp.verify(path)
    assert any(message in p for p in problems), problems
    with pytest.raises(CheckpointError) as caught:
        zp.load(path, model=Small())
    assert message in str(caught.value)


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", defaults(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_of_every_format_comes_back_bit_by_bit(scheme, dtype, tmp_path):
    weight = rtn(example_weight(6, 128, dtype), scheme)
    contents = native.Contents(
        qweights={"x.weight": weight},
        tensors={"x.bias": torch.randn(6).to(dtype)},
        tied={"y.weight": "x.weight"},
        recipe=RECIPE,
        config={"note": "ü"},
    )
    write(tmp_path / "m", contents)
    assert native.is_checkpoint(tmp_path / "m") and zp.verify(tmp_path / "m") == []
    found = native.read(tmp_path / "m")
    loaded = found.qweights["x.weight"]
    assert (loaded.scheme, loaded.shape, loaded.dtype) == (scheme, weight.shape, dtype)
    assert loaded.parts.keys() == weight.parts.keys()
    for suffix, part in weight.parts.items():
        assert loaded.parts[suffix].dtype == part.dtype and torch.equal(loaded.parts[suffix], part)
    assert torch.equal(found.tensors["x.bias"], contents.tensors["x.bias"])
    assert (found.tied, found.recipe) == (contents.tied, RECIPE)
    assert found.config["note"] == native.read_config(tmp_path / "m")["note"] == "ü"


@pytest.mark.parametrize("limit", [1, 300, 900])
def test_a_large_model_is_written_in_shards_with_an_index(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "MAX_SHARD_BYTES", limit)
    model = small()
    zp.save(model, tmp_path / "m")
    index = json.loads((tmp_path / "m" / native.INDEX).read_text())
    shards = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert shards == sorted(set(index["weight_map"].values())) and len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    state = model.state_dict()
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert zp.verify(tmp_path / "m") == []
    assert torch.equal(output_of(tmp_path / "m"), model(INPUT))


def test_a_sharded_transformers_model_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "MAX_SHARD_BYTES", 20_000)
    model = build("llama-tied")
    zp.quantize(model, "int4")
    zp.freeze(model)
    zp.save(model, tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert torch.equal(outputs(zp.load(tmp_path / "m")[0]), outputs(model))


def test_other_files_belong_to_the_checkpoint(tmp_path):
    contents = native.Contents(qweights={}, tensors={}, tied={}, recipe=RECIPE)
    with native.write(tmp_path / "m", contents, overwrite=False) as folder:
        (folder / "words").mkdir()
        (folder / "words" / "list.txt").write_text("one two")
    assert zp.verify(tmp_path / "m") == []
    (tmp_path / "m" / "words" / "list.txt").write_text("one six")
    assert "words/list.txt has another SHA-256" in zp.verify(tmp_path / "m")[0]


# --- loaders without zeropoint --------------------------------------------------------------------


WITHOUT_ZEROPOINT = """
import sys
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (RuntimeError, ValueError) as e:
        print("refused:", "mismatch" in str(e))
    else:
        print("loaded")
assert not any(name.startswith("zeropoint") for name in sys.modules)
"""


@pytest.mark.parametrize("write", [zp.save, lambda m, path: m.save_pretrained(path)])
def test_loading_without_zeropoint_fails_loudly(write, tmp_path):
    folders = []
    for weights in ("int8", "int4", "nf4", "mxfp8_e4m3", "nvfp4", "float8_e4m3fn"):
        model = build("llama")
        zp.quantize(model, weights)
        zp.freeze(model)
        folder = tmp_path / weights
        write(model, folder)
        plain = tmp_path / f"{weights}-plain"
        shutil.copytree(folder, plain)
        config = json.loads((plain / "config.json").read_text())
        del config["quantization_config"]
        (plain / "config.json").write_text(json.dumps(config))
        folders += [folder, plain]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ZEROPOINT, *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["refused: True"] * len(folders)


def test_codes_do_not_fit_into_a_float_module(path):
    from safetensors.torch import load_file

    state = load_file(path / "model.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch for layer.weight"):
        Small().load_state_dict(state, strict=False)


# --- damage to files ------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_tensor_file_is_found(path, share):
    file = path / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as f:
        f.truncate(int(size * share))
    message = f"model.safetensors has {int(size * share)} bytes, not {size}: truncated or replaced"
    both_refuse(path, message)


def test_a_missing_tensor_file_is_found(path):
    (path / "model.safetensors").unlink()
    both_refuse(path, "model.safetensors is missing")


def test_a_flipped_bit_anywhere_is_found_and_never_changes_the_model(path):
    """50 bits, one at a time, spread over all files."""
    expected = output_of(path)
    generator = torch.Generator().manual_seed(0)
    files = sorted(p for p in path.iterdir())
    assert {f.name for f in files} == {"config.json", "model.safetensors", "zeropoint.json"}
    silent = []
    for i in range(50):
        file = files[i % len(files)]
        original = file.read_bytes()
        bit = int(torch.randint(8 * len(original), (1,), generator=generator))
        flipped = bytearray(original)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        if not zp.verify(path):
            silent.append(f"verify: {file.name} bit {bit}")
        try:
            if not torch.equal(output_of(path), expected):
                silent.append(f"load: {file.name} bit {bit}")
        except ZeropointError:
            pass
        file.write_bytes(original)
    assert not silent
    assert zp.verify(path) == [] and torch.equal(output_of(path), expected)


def test_an_edited_configuration_is_found(tmp_path):
    model = build("llama")
    zp.quantize(model)
    zp.freeze(model)
    zp.save(model, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    (problem,) = zp.verify(tmp_path / "m")
    assert problem.startswith("config.json has another SHA-256 than when")
    with pytest.raises(CheckpointError, match="config.json has another SHA-256 than when"):
        zp.load(tmp_path / "m")


@pytest.mark.parametrize("file", ["config.json", "zeropoint.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000])
def test_a_json_file_that_is_none_is_found(path, file, text):
    (path / file).write_text(text)
    assert any(file in problem for problem in zp.verify(path))
    with pytest.raises(
        CheckpointError, match=rf"{file} (cannot be read|is not a JSON object|has \d+ bytes)"
    ):
        zp.load(path, model=Small())


def test_a_json_file_that_is_not_text_is_found(path):
    (path / "config.json").write_bytes(b"\xff\xfe{}")
    both_refuse(path, "config.json has 4 bytes")


def test_a_file_that_nobody_listed_is_found(path):
    (path / "extra.bin").write_text("x")
    assert zp.verify(path) == ["extra.bin is not in the manifest"]


def test_all_damage_is_listed(path):
    (path / "extra.bin").write_text("x")
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    problems = zp.verify(path)
    assert len(problems) == 2 and "SHA-256" in problems[0] and "extra.bin" in problems[1]


# --- damage to tensors, with hashes that are right ------------------------------------------------


def test_a_missing_tensor_is_found(path):
    edit_tensors(path, lambda t: t.pop("norm.weight"))
    both_refuse(path, "norm.weight is missing")


@pytest.mark.parametrize("part", ["layer.weight", "layer.weight_scale", "layer.weight_zero_point"])
def test_a_missing_part_is_found(path, part):
    edit_tensors(path, lambda t: t.pop(part))
    both_refuse(path, f"{part} is missing; int4 g32 asymmetric needs it")


def test_an_extra_part_is_found(path):
    zeros = torch.zeros(7, 1, dtype=torch.int8)
    edit_tensors(path, lambda t: t.update({"embed.weight_zero_point": zeros}))
    both_refuse(path, "embed.weight_zero_point is there, but int8 per channel has no such part")


def test_an_extra_tensor_is_found(path):
    edit_tensors(path, lambda t: t.update({"layer.weight_old": torch.ones(3)}))
    both_refuse(path, "layer.weight_old is in no manifest entry")


def test_a_float_twin_of_a_quantized_tensor_is_found(path):
    edit_tensors(path, lambda t: t.update({"head.weight": torch.ones(7, 32)}))
    both_refuse(path, "head.weight is in no manifest entry")


@pytest.mark.parametrize(
    ("name", "new", "message"),
    [
        ("norm.weight", torch.ones(33), "norm.weight is {'shape': [33], 'dtype': 'float32'}, but"),
        (
            "norm.weight",
            torch.ones(32).half(),
            "norm.weight is {'shape': [32], 'dtype': 'float16'}, but",
        ),
        ("layer.weight", torch.zeros(511, dtype=torch.uint8), "layer.weight is (511,) torch.uint8"),
        ("layer.weight", torch.zeros(512, dtype=torch.int8), "layer.weight is (512,) torch.int8"),
        ("layer.weight_scale", torch.ones(32, 1), "layer.weight_scale is (32, 1) torch.float32"),
        ("embed.weight_scale", torch.ones(1, 1), "embed.weight_scale is (1, 1) torch.float32"),
    ],
)
def test_a_wrong_shape_or_dtype_is_found(path, name, new, message):
    edit_tensors(path, lambda t: t.update({name: new}))
    both_refuse(path, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["layer.weight_scale", "embed.weight_scale", "norm.bias"])
def test_a_value_that_is_not_finite_is_found(path, name, value):
    edit_tensors(path, lambda t: t[name].view(-1)[3:4].fill_(value))
    assert zp.verify(path) == [f"{name} holds NaN or Inf"]


def test_a_float_zero_point_that_is_not_finite_is_found(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32))
    zp.quantize(model, "int2", float_zero_point=True)
    zp.freeze(model)
    zp.save(model, tmp_path / "m")
    assert zp.verify(tmp_path / "m") == []
    edit_tensors(tmp_path / "m", lambda t: t["0.weight_zero_point"][0, :1].fill_(float("nan")))
    assert zp.verify(tmp_path / "m") == ["0.weight_zero_point holds NaN or Inf"]


def test_levels_are_stored_beside_their_weight_and_checked(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32))
    zp.quantize(model, "any4")
    zp.freeze(model)
    zp.save(model, tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as stored:
        levels = stored.get_tensor("0.weight_levels")
    assert torch.equal(levels, model[0].weight.levels)
    assert levels.shape == (32, 16) and levels.dtype == torch.float16
    assert zp.verify(tmp_path / "m") == []
    edit_tensors(tmp_path / "m", lambda t: t["0.weight_levels"][3, 5:6].fill_(float("nan")))
    assert zp.verify(tmp_path / "m") == ["0.weight_levels holds NaN or Inf"]
    edit_tensors(tmp_path / "m", lambda t: t.pop("0.weight_levels"))
    both_refuse(tmp_path / "m", "0.weight_levels is missing; any4 g64 needs it")


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_a_scale_that_is_not_positive_is_found(path, value):
    edit_tensors(path, lambda t: t["layer.weight_scale"].view(-1)[3:4].fill_(value))
    assert zp.verify(path) == [f"layer.weight_scale holds {value}, but scales are positive"]


def test_a_symmetric_scale_of_few_bits_may_be_negative_but_not_zero(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32))
    zp.quantize(model, "int3", symmetric=True)
    zp.freeze(model, "mse")
    assert (model[0].weight.scale < 0).any()
    zp.save(model, tmp_path / "m")
    assert zp.verify(tmp_path / "m") == []
    edit_tensors(tmp_path / "m", lambda t: t["0.weight_scale"][0, :1].fill_(0.0))
    assert zp.verify(tmp_path / "m") == ["0.weight_scale holds 0.0, but scales are positive"]


def test_a_downcast_weight_that_is_not_finite_is_found(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32))
    zp.quantize(model, "bfloat16")
    zp.freeze(model)
    zp.save(model, tmp_path / "m")
    edit_tensors(tmp_path / "m", lambda t: t["0.weight"][0, :1].fill_(float("inf")))
    assert zp.verify(tmp_path / "m") == ["0.weight holds NaN or Inf"]


def test_a_tensor_in_two_files_is_found(path):
    shutil.copy(path / "model.safetensors", path / "more.safetensors")

    def list_it(manifest):
        manifest["files"]["more.safetensors"] = {}

    edit_manifest(path, list_it)
    both_refuse(path, "is in two files")


def test_a_file_that_is_no_safetensors_is_found(path):
    (path / "model.safetensors").write_bytes(b"not at all")
    edit_manifest(path, lambda manifest: None)
    both_refuse(path, "model.safetensors cannot be read: ")


# --- the manifest ---------------------------------------------------------------------------------


def test_a_newer_version_is_refused_with_the_remedy(path):
    edit_manifest(path, lambda m: m.update(format_version=native.FORMAT_VERSION + 1), sign=False)
    message = (
        "newer zeropoint (format 2, this one reads up to 1); upgrade: pip install -U zeropoint"
    )
    both_refuse(path, message)


def test_an_edited_manifest_is_refused(path):
    def swap(manifest):
        manifest["tied"] = {"layer.weight": "embed.weight"}

    edit_manifest(path, swap, sign=False)
    both_refuse(path, "zeropoint.json: the manifest was changed or damaged after it was written")


@pytest.mark.parametrize("key", ["weights", "tensors", "tied", "files"])
@pytest.mark.parametrize("value", [None, []])
def test_a_manifest_without_a_part_is_refused(path, key, value):
    manifest = read_manifest(path)
    files = manifest["files"]
    if value is None:
        del manifest[key]
    else:
        manifest[key] = value
    signed = manifest | {"files": {}}
    write_manifest(path, signed)  # to have the digest computed the same way
    if key == "files":
        rest = {k: v for k, v in manifest.items() if k != "digest"}
        write_manifest(path, rest | {"digest": native._digest(rest)}, sign=False)
    else:
        write_manifest(path, manifest | {"files": files})
    both_refuse(path, f"zeropoint.json: the manifest has no '{key}'")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_a_file_outside_the_folder_is_refused(path, name):
    edit_manifest(path, lambda m: m["files"].update({name: {"bytes": 1, "sha256": ""}}))
    both_refuse(path, f"zeropoint.json names {name!r}, which is outside the folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["scheme"].update(format="int9"), "'int9' is not a format"),
        (lambda row: row["scheme"].update(colour="red"), "layer.weight: .*colour"),
        (lambda row: row.update(dtype="float31"), "layer.weight: .*float31"),
        (lambda row: row.update(dtype="nn"), "layer.weight"),
        (lambda row: row.update(shape=[32, 33]), "layer.weight"),
        (lambda row: row.update(shape=[-32, -32]), "layer.weight"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(path, change, message):
    edit_manifest(path, lambda m: change(m["weights"]["layer.weight"]))
    with pytest.raises(CheckpointError, match=message):
        zp.load(path, model=Small())
    assert zp.verify(path)


def test_a_tie_to_nothing_is_refused(path):
    edit_manifest(path, lambda m: m.update(tied={"head.weight": "gone.weight"}))
    assert zp.verify(path) == ["head.weight is tied to gone.weight, which is missing"]
    with pytest.raises(CheckpointError, match="lacks gone.weight"):
        zp.load(path, model=Small())


# --- the configuration ----------------------------------------------------------------------------


def edit_config(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    edit_manifest(path, lambda manifest: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("quantization_config"),
        lambda c: c.update(quantization_config=[]),
        lambda c: c["quantization_config"].update(quant_method="gptq"),
    ],
)
def test_a_configuration_of_another_method_is_refused(path, change):
    edit_config(path, change)
    both_refuse(path, "config.json has no quantization_config of quant_method 'zeropoint'")


def test_a_configuration_with_a_bad_recipe_is_refused(path):
    edit_config(path, lambda c: c["quantization_config"].update(recipe={"rules": [{"match": 3}]}))
    both_refuse(path, "config.json: a rule is a mapping with a pattern called 'match'")


# --- verify ---------------------------------------------------------------------------------------


def test_verify_needs_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="x is not a folder"):
        zp.verify(tmp_path / "x")
    with pytest.raises(
        CheckpointError, match="holds no zeropoint.json; only zeropoint checkpoints"
    ):
        zp.verify(tmp_path)


def test_verify_reports_its_progress(path):
    steps = []
    zp.verify(path, on_step=lambda *step: steps.append(step))
    assert steps == [("config.json", 0, 2), ("model.safetensors", 1, 2)]
